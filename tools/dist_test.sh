#!/usr/bin/env bash
# Test on several GPUs (or, without CUDA, in several CPU processes) of one or more machines:
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of tools/test.py]
# GPUS may also come from the environment, and on each of several machines NNODES, NODE_RANK, MASTER_ADDR and PORT do.
set -euo pipefail
exec "$(dirname "$0")/torchrun.sh" "$0" test.py 2 "$@"
