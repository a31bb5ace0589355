#!/usr/bin/env bash
# Runs the trainer's model tests against another megatron-core than the one of .venv.
#   scripts/mcore-lane.sh [version] [pytest arguments ...]     for example 0.19.2 -m "not slow"
# The version is laid over the environment from a folder of its own under .venv. Its wheels ask for
# Python 3.12 in their metadata from 0.17 on, but are built for 3.11 too and run there.
set -euo pipefail

project="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$project/.venv/bin/python"
version="${1:-0.19.2}"
[ "$#" -gt 0 ] && shift
overlay="$project/.venv/lanes/megatron-core-$version"

if [ ! -d "$overlay/megatron" ]; then
    partial="$overlay.part"
    rm -rf "$partial"
    "$python" -m pip install --quiet --ignore-requires-python --no-deps \
        --target "$partial" "megatron-core==$version"
    mkdir -p "$(dirname "$overlay")"
    mv "$partial" "$overlay"
fi

export PYTHONPATH="$overlay${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1
cd "$project"
found="$("$python" -W ignore -c '
from miles_lite.trainer.megatron import cpu_compat
cpu_compat.install()
import megatron.core
print(megatron.core.__version__)')"
if [ "${found%%+*}" != "$version" ]; then
    echo "mcore-lane: wanted megatron-core $version, python imports $found" >&2
    exit 1
fi
echo "mcore-lane: megatron-core $found"
exec "$python" -m pytest tests/trainer/test_model.py tests/trainer/test_forward.py \
    tests/trainer/test_logprob.py tests/trainer/test_replay.py -W ignore "$@"
