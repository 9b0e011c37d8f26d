#!/usr/bin/env bash
# Shared by dist_train.sh and dist_test.sh:
#   torchrun.sh CALLER SCRIPT FILES FILE... [GPUS] [arguments]
# FILES is the number of files before the number of processes.
set -euo pipefail
caller=$1 script=$2 files=$3
shift 3
given=("${@:1:$files}")
shift "$((files < $# ? files : $#))"
if [[ ${1:-} =~ ^[0-9]+$ ]]; then GPUS=$1; shift; fi
if [[ ${#given[@]} -lt $files || -z ${GPUS:-} ]]; then
    sed -n 's/^#   *\(tools\)/usage: \1/p' "$caller" >&2
    exit 2
fi
if [[ ${MAX_RESTARTS:-0} -gt 0 ]]; then
    # This rendezvous informs the other nodes of a restart.
    rendezvous=(--rdzv_backend=c10d --rdzv_endpoint="${MASTER_ADDR:-127.0.0.1}:${PORT:-29500}" --rdzv_id="${PORT:-29500}")
else
    rendezvous=(--node_rank="${NODE_RANK:-0}" --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}")
fi
exec "${PYTHON:-python}" "$(dirname "$0")/torchrun.py" \
    --nnodes="${NNODES:-1}" \
    "${rendezvous[@]}" \
    --nproc_per_node="$GPUS" \
    --max_restarts="${MAX_RESTARTS:-0}" \
    "$(dirname "$0")/$script" "${given[@]}" --launcher pytorch "$@"
