#!/usr/bin/env bash
# All checks: style, types, shell scripts, known holes of dependencies, then the quick tests, the
# slow ones, those of SGLang.
#   scripts/test.sh                           stops at the first step that fails
#   scripts/test.sh tests/test_run.py -k ...  only pytest, with these arguments
set -euo pipefail

project="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$project/scripts/setup.sh"
cd "$project"
export PATH="$project/.venv/bin:$PATH" # where ruff, pyright and shellcheck are
export OMP_NUM_THREADS=1               # ranks are processes; threads on top only get in their way
# Half of a test is waiting: for processes to start, deadlines to pass. So two files run at a time.
two=(--numprocesses 2 --dist loadfile)

log="$(mktemp)"
trap 'rm -f "$log"' EXIT
closing="" # what pytest said last, for each lane

say() { echo "== $* ($SECONDS s)"; }

lane() {
    say "pytest -m '$1'"
    local code=0
    python -m pytest "${two[@]}" -m "$1" 2>&1 | tee "$log" || code=$?
    if [[ $code == 5 ]]; then # no test carries this mark
        return
    fi
    if [[ $code != 0 ]]; then
        exit "$code"
    fi
    closing+="$(tail -n 1 "$log")"$'\n'
}

if [[ $# -gt 0 ]]; then
    python -m pytest "$@"
    exit
fi

say "ruff"
ruff check .
ruff format --check .
say "pyright"
pyright
if command -v shellcheck >/dev/null; then
    say "shellcheck"
    shellcheck scripts/*.sh .ci/run
fi
if command -v hadolint >/dev/null; then # its wheels are for some platforms only
    say "hadolint"
    hadolint docker/Dockerfile docker/Dockerfile.cpu
fi
bash scripts/audit.sh
bash scripts/setup-browser.sh # Chromium, if it may be installed
lane "not slow and not sglang"
lane "slow and not sglang"
bash scripts/setup-sglang-cpu.sh # a minute or two; an environment of its own
lane "sglang"
say "all passed"
echo -n "$closing"
