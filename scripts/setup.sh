#!/usr/bin/env bash
# Makes .venv in the project: the tested versions of everything, on CPU. Does nothing when up to date.
#   MILES_LITE_LOCKED=1 bash scripts/setup.sh   takes only files with the hashes of scripts/cpu.lock
# torch comes from pip as pip is configured here. Where pip only knows torch's CUDA build, give it
# PyTorch's index of CPU wheels in PIP_EXTRA_INDEX_URL, and some gigabytes stay away.
set -euo pipefail

project="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
me="setup"
venv="$project/.venv"
constraints="$project/scripts/constraints-cpu.txt"
lock="$project/scripts/cpu.lock"
stamp="$venv/setup-done"
extras="dev,wandb,serve"
# shellcheck source=scripts/venv.sh
source "$project/scripts/venv.sh"

wanted="$project ${MILES_LITE_LOCKED:-} $(cat "$project/pyproject.toml" "$constraints" "$lock" "${BASH_SOURCE[0]}" \
    "$project/scripts/venv.sh" | cksum)"
if [[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
    exit 0
fi

make_venv
if [[ -n "${MILES_LITE_LOCKED:-}" ]]; then
    say "installing the files of $(basename "$lock") by their hashes: some minutes"
    sed -n '/^setuptools==/,/[^\\]$/p' "$lock" | pip install -qq --require-hashes --no-deps -r /dev/stdin
    pip install -qq --no-compile --no-build-isolation --require-hashes --no-deps -r "$lock"
    say "torch, with the libraries of a CUDA build, by version alone: see scripts/lock.sh"
    install_torch "$constraints"
    pip install -qq --no-compile --no-deps --no-build-isolation --editable "$project"
    pip check
else
    install_torch "$constraints"
    say "installing miles-lite[$extras]: a minute or two"
    install "$constraints" --editable "${project}[$extras]"
fi
compile
echo "$wanted" >"$stamp"
say "ready after $SECONDS s"
