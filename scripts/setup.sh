#!/usr/bin/env bash
# Makes .venv in the project: the tested versions of everything, on CPU. Does nothing when up to date.
# torch comes from pip as pip is configured here. Where pip only knows torch's CUDA build, give it
# PyTorch's index of CPU wheels in PIP_EXTRA_INDEX_URL, and some gigabytes stay away.
set -euo pipefail

project="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$project/.venv"
constraints="$project/scripts/constraints-cpu.txt"
stamp="$venv/setup-done"
extras="dev,wandb"

say() { echo "setup: $*"; }
fail() {
    echo "setup: $*" >&2
    exit 1
}

is_good_python() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3 python; do
        if is_good_python "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "found no Python 3.11 or 3.12. Install one (on Debian: apt install python3.11 python3.11-venv)," \
        "so that 'python3.11' runs, and try again"
}

make_venv() {
    local python
    python="$(find_python)"
    say "making .venv with $("$python" --version)"
    if ! "$python" -m venv --clear "$venv"; then
        fail "'$python -m venv' failed: its venv or ensurepip module may be missing" \
            "(on Debian: apt install python3-venv)"
    fi
}

pip() { "$venv/bin/python" -m pip "$@"; }

# uv is several times faster than pip, but knows nothing of pip's configuration: so torch is never
# left to it, and whatever it cannot find, pip tries again.
find_uv() {
    command -v uv && return
    pip install -qq --no-compile --disable-pip-version-check --constraint "$constraints" uv &&
        echo "$venv/bin/uv"
}

install_project() {
    local uv
    say "installing miles-lite[$extras]: a minute or two"
    if uv="$(find_uv)" && "$uv" pip install --quiet --python "$venv/bin/python" \
        --constraint "$constraints" --editable "${project}[$extras]"; then
        return
    fi
    say "uv could not; trying pip: a few minutes"
    pip install -qq --no-compile --disable-pip-version-check \
        --constraint "$constraints" --editable "${project}[$extras]"
}

wanted="$project $(cat "$project/pyproject.toml" "$constraints" "${BASH_SOURCE[0]}" | cksum)"
if [[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
    exit 0
fi

if [[ -x "$venv/bin/python" ]] && ! is_good_python "$venv/bin/python"; then
    fail "$venv is not Python 3.11 or 3.12: remove it and try again"
fi
if ! pip --version >/dev/null 2>&1; then
    make_venv
fi
say "installing $(grep '^torch==' "$constraints") with pip: some hundred megabytes if not cached"
pip install -qq --no-compile --disable-pip-version-check --constraint "$constraints" torch
install_project
say "compiling: about a minute, and every process of a run starts in a third of the time"
# some packages carry templates that are no valid Python: those stay as they are
env -u PYTHONDONTWRITEBYTECODE "$venv/bin/python" -m compileall -q -j 0 "$venv/lib" >/dev/null 2>&1 || :
echo "$wanted" >"$stamp"
say "ready after $SECONDS s"
