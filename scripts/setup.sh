#!/usr/bin/env bash
# Makes .venv in the project: the tested versions of everything, on CPU. Does nothing when up to date.
# torch comes from pip as pip is configured here. Where pip only knows torch's CUDA build, give it
# PyTorch's index of CPU wheels in PIP_EXTRA_INDEX_URL, and some gigabytes stay away.
set -euo pipefail

project="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
me="setup"
venv="$project/.venv"
constraints="$project/scripts/constraints-cpu.txt"
stamp="$venv/setup-done"
extras="dev,wandb,serve"
# shellcheck source=scripts/venv.sh
source "$project/scripts/venv.sh"

wanted="$project $(cat "$project/pyproject.toml" "$constraints" "${BASH_SOURCE[0]}" \
    "$project/scripts/venv.sh" | cksum)"
if [[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
    exit 0
fi

make_venv
install_torch "$constraints"
say "installing miles-lite[$extras]: a minute or two"
install "$constraints" --editable "${project}[$extras]"
compile
echo "$wanted" >"$stamp"
say "ready after $SECONDS s"
