#!/usr/bin/env bash
# Writes scripts/cpu.lock: the packages of scripts/constraints-cpu.txt with the hashes that PyPI
# publishes of their files. Run it after a change of the constraints.
# torch is left out: which file of it is installed, with which hash, depends on the index it comes
# from (PyPI's is the CUDA build, CPU builds lie with PyTorch).
set -euo pipefail

project="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
lock="$project/scripts/cpu.lock"
{
    echo "# Made by scripts/lock.sh; for MILES_LITE_LOCKED=1 bash scripts/setup.sh."
    grep -v -e '^#' -e '^torch==' "$project/scripts/constraints-cpu.txt" |
        "$project/.venv/bin/uv" pip compile --quiet --no-deps --generate-hashes --no-header \
            --no-annotate --no-config --python-version 3.11 -
} >"$lock.new"
mv "$lock.new" "$lock"
