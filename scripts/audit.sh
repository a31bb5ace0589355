#!/usr/bin/env bash
# Asks the databases of known security holes about every package of scripts/cpu.lock and torch, with
# pip-audit, for some minutes at most. What it finds is shown, and fails nothing: a hole published
# tonight is no fault of a change, and whoever runs this decides. Skipped where there is no answer.
set -euo pipefail

project="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
say() { echo "== pip-audit: $*"; }

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
if ! timeout 60 "$project/.venv/bin/python" -m venv "$folder/venv" ||
    ! timeout 60 "$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check \
        'pip-audit==2.10.0' >"$folder/out" 2>&1; then
    say "SKIPPED, known holes of dependencies were NOT looked up: pip-audit cannot be installed"
    exit 0
fi
look_up() { # requirements file; the status is pip-audit's
    timeout 120 "$folder/venv/bin/pip-audit" --disable-pip --no-deps --progress-spinner off \
        --requirement "$1" >"$folder/out" 2>&1
}

# a mirror of PyPI may answer, and know of no hole at all: it must know this one
echo 'jinja2==2.10' >"$folder/canary.txt"
if look_up "$folder/canary.txt" || ! grep -q '^Found .* known vulnerabilit' "$folder/out"; then
    say "SKIPPED, known holes of dependencies were NOT looked up: nothing that knows them answers:" \
        "$(tail -n 1 "$folder/out" | cut -c -200)"
elif look_up "$project/scripts/constraints-cpu.txt"; then
    say "no known holes"
elif grep -q '^Found .* known vulnerabilit' "$folder/out"; then
    cat "$folder/out"
    say "FOUND the above"
else
    say "SKIPPED, known holes of dependencies were NOT looked up: $(tail -n 1 "$folder/out" | cut -c -200)"
fi
