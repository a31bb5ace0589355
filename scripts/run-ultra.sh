#!/usr/bin/env bash
# A run on many hosts: on one of them
#   bash scripts/run-ultra.sh head <HEAD_IP> [key=value ...]
# and on every other one, before or after, the same address:
#   bash scripts/run-ultra.sh worker <HEAD_IP>
# It ends on all of them with the run, and with its status. The same words again go on with the run.
# In the environment:
#   EXPERIMENT  a file of configs/experiment; nemotron3_ultra
#   NUM_NODES   hosts, the head too; as many as the layout fills
#   NODES       their addresses, 10.0.0.1,10.0.0.2,..., so that who is missing has a name
#   WAIT_S      how long each side waits for the other; 900
#   PORT_BASE   first of a block of 1010 ports, the same on all hosts; 6379
#   NODE_IP     of a worker with several addresses: the one that the others reach
set -euo pipefail

usage="usage: [EXPERIMENT=NAME] [NUM_NODES=N] $0 head|worker <HEAD_IP> [key=value ...]"
role="${1:?$usage}"
head_ip="${2:?$usage}"
shift 2

project="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$project/.venv/bin/python}"
if [[ ! -x "$python" ]]; then
    echo "$python is not there: run scripts/setup.sh, or say which in PYTHON" >&2
    exit 2
fi
options=(--port "${PORT_BASE:-6379}" --wait "${WAIT_S:-900}")
case "$role" in
head) options+=(--nodes "${NUM_NODES:-0}" --hosts "${NODES:-}" "experiment=${EXPERIMENT:-nemotron3_ultra}") ;;
worker) options+=(--own "${NODE_IP:-}") ;;
*)
    echo "$usage" >&2
    exit 2
    ;;
esac
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
cd "$project"
exec "$python" -m miles_lite.cli launch "$role" "$head_ip" "${options[@]}" "$@"
