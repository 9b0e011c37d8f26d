#!/usr/bin/env bash
# Test on several GPUs (without CUDA: in several CPU processes) of one or more machines:
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of tools/test.py]
# GPUS can also be an environment variable. With several machines, set NNODES, NODE_RANK, MASTER_ADDR and PORT on each.
set -euo pipefail
exec "$(dirname "$0")/torchrun.sh" "$0" test.py 2 "$@"
