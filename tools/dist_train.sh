#!/usr/bin/env bash
# Train on several GPUs (without CUDA: in several CPU processes) of one or more machines:
#   tools/dist_train.sh CONFIG GPUS [arguments of tools/train.py]
# GPUS can also be an environment variable. With several machines, set NNODES, NODE_RANK, MASTER_ADDR and PORT on each.
# MAX_RESTARTS (0): how often to restart processes that died; with --resume they continue from the last checkpoint.
set -euo pipefail
exec "$(dirname "$0")/torchrun.sh" "$0" train.py 1 "$@"
