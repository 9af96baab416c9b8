#!/usr/bin/env bash
# Train on several processes: tools/dist_train.sh CONFIG PROCESSES [options of train.py]
# NNODES, NODE_RANK, MASTER_ADDR and PORT are read from the environment; without a GPU the processes use gloo.
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n 2,3p "$0" | cut -c3- >&2
    exit 2
fi
CONFIG=$1
PROCESSES=$2
shift 2
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$PROCESSES" \
    "$(dirname "$0")/train.py" "$CONFIG" --launcher pytorch "$@"
