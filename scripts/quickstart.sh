#!/usr/bin/env bash
# From a fresh checkout to a trained model: sets up, then runs GRPO on a tiny model, on CPU.
#   scripts/quickstart.sh [key=value ...]     for example train.num_steps=5
set -euo pipefail

project="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$project/scripts/setup.sh"
exec "$project/.venv/bin/miles-lite" train experiment=tiny "$@"
