#!/usr/bin/env bash
# Chromium for tests/report/, from the distribution. Without it, and without root, those tests skip.
set -euo pipefail

me="setup-browser"
say() { echo "$me: $*"; }

if command -v chromium >/dev/null; then
    exit 0
fi
if [[ "$(id -u)" != 0 ]] || ! command -v apt-get >/dev/null; then
    say "no chromium, and no right to install it: the tests in a browser will be skipped" \
        "(on Debian: apt install chromium)"
    exit 0
fi
say "installing chromium"
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null
