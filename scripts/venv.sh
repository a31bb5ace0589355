# shellcheck shell=bash disable=SC2154 # `me` and `venv` are set by who sources this
# What the set-up scripts share. `me` is their name, `venv` the folder of their environment.

say() { echo "$me: $*"; }
fail() {
    echo "$me: $*" >&2
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

pip() { "$venv/bin/python" -m pip "$@"; }

make_venv() {
    local python
    if [[ -x "$venv/bin/python" ]] && ! is_good_python "$venv/bin/python"; then
        fail "$venv is not Python 3.11 or 3.12: remove it and try again"
    fi
    if pip --version >/dev/null 2>&1; then
        return
    fi
    python="$(find_python)"
    say "making $(basename "$venv") with $("$python" --version)"
    if ! "$python" -m venv --clear "$venv"; then
        fail "'$python -m venv' failed: its venv or ensurepip module may be missing" \
            "(on Debian: apt install python3-venv)"
    fi
}

install_torch() { # from the constraints in $1, without what it depends on if $2 is --no-deps
    say "installing $(grep '^torch==' "$1") with pip: some hundred megabytes if not cached"
    pip install -qq --no-compile --disable-pip-version-check --constraint "$1" "${@:2}" torch
}

# uv is several times faster than pip, but knows nothing of pip's configuration: so torch is never
# left to it, and whatever it cannot find, pip tries again.
find_uv() { # installs the version in the constraints $1 if there is none
    command -v uv && return
    pip install -qq --no-compile --disable-pip-version-check --constraint "$1" uv &&
        echo "$venv/bin/uv"
}

install() { # with constraints $1 what the other arguments say to `pip install`
    local uv constraints="$1"
    if uv="$(find_uv "$constraints")" && "$uv" pip install --quiet --python "$venv/bin/python" \
        --constraint "$constraints" "${@:2}"; then
        return
    fi
    say "uv could not; trying pip: a few minutes"
    pip install -qq --no-compile --disable-pip-version-check --constraint "$constraints" "${@:2}"
}

compile() {
    say "compiling: about a minute, and every process of a run starts in a third of the time"
    # some packages carry templates that are no valid Python: those stay as they are
    env -u PYTHONDONTWRITEBYTECODE "$venv/bin/python" -m compileall -q -j 0 "$venv/lib" >/dev/null 2>&1 || :
}
