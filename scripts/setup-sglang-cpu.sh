#!/usr/bin/env bash
# Makes .venv-sglang in the project: SGLang on CPU. Does nothing when up to date.
# An environment of its own, as SGLang pins another torch; no CUDA package is in it and no triton.
# scripts/sglang-cpu.txt names every package, so nothing is resolved: SGLang's own metadata asks for
# torch's CUDA build and for gigabytes of kernels that no CPU can run. miles_lite is not installed
# but found through PYTHONPATH, and with miles_lite/rollout/sglang/cpu on it too, SGLang starts.
set -euo pipefail

project="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
me="setup-sglang-cpu"
venv="$project/.venv-sglang"
packages="$project/scripts/sglang-cpu.txt"
stamp="$venv/setup-done"
# shellcheck source=scripts/venv.sh
source "$project/scripts/venv.sh"

wanted="$project $(cat "$packages" "${BASH_SOURCE[0]}" "$project/scripts/venv.sh" | cksum)"
if [[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
    exit 0
fi

make_venv
install_torch "$packages" --no-deps
say "installing $(grep '^sglang==' "$packages"): half a minute"
install "$packages" --no-deps --requirement "$packages"
compile
echo "$wanted" >"$stamp"
say "ready after $SECONDS s"
