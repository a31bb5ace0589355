#!/usr/bin/env bash
# Nemotron 3 Nano 30B-A3B on one host of 8 GPUs: bash scripts/run-nano.sh head <IP> [key=value ...]
# Words and environment are those of run-ultra.sh.
set -euo pipefail

export EXPERIMENT="${EXPERIMENT:-nemotron3_nano_30b}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/run-ultra.sh" "$@"
