#!/usr/bin/env bash
# Train on several GPUs (or, without CUDA, in several CPU processes) of one or more machines:
#   tools/dist_train.sh CONFIG GPUS [arguments of tools/train.py]
# GPUS may also come from the environment, and on each of several machines NNODES, NODE_RANK, MASTER_ADDR and PORT do.
# MAX_RESTARTS (0): how often processes that died are started again; with --resume they continue from the last checkpoint.
set -euo pipefail
exec "$(dirname "$0")/torchrun.sh" "$0" train.py 1 "$@"
