#!/usr/bin/env bash
# One host's share of converting Nemotron 3 Ultra to Megatron torch_dist. On each of 16 hosts, with a
# folder that all of them see:
#   MODELS_DIR=/shared/models bash scripts/convert-ultra.sh <NODE_RANK 0..15> <HEAD_IP>
# Killed hosts are started again with the same words; what is finished stays.
set -euo pipefail

usage="usage: MODELS_DIR=/shared/models $0 <NODE_RANK 0..15> <HEAD_IP>"
node_rank="${1:?$usage}"
head_ip="${2:?$usage}"
models="${MODELS_DIR:?$usage}"
num_nodes="${NUM_NODES:-16}"
workers="${WORKERS:-8}"
name="${MODEL_NAME:-NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16}"

if ! [[ "$node_rank" =~ ^[0-9]+$ ]] || ((node_rank >= num_nodes)); then
    echo "node rank $node_rank is not one of 0 to $((num_nodes - 1))" >&2
    exit 2
fi
if [[ ! -d "$models/$name" ]]; then
    echo "$models/$name is not there: download the checkpoint first, or set MODEL_NAME" >&2
    exit 2
fi

project="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export OMP_NUM_THREADS=1
exec "$project/.venv/bin/miles-lite" convert hf-to-dist --hf "$models/$name" \
    --out "$models/${name}_torch_dist" --node-rank "$node_rank" --num-nodes "$num_nodes" \
    --head-ip "$head_ip" --workers "$workers"
