#!/usr/bin/env bash
# Test under Slurm:
#   tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of tools/test.py]
# Environment variables: GPUS (8), GPUS_PER_NODE (8), CPUS_PER_TASK (8) and SRUN_ARGS.
set -euo pipefail
if [ $# -lt 4 ]; then sed -n 's/^#  *//p' "$0" >&2; exit 2; fi
exec "$(dirname "$0")/srun.sh" "$1" "$2" "$(dirname "$0")/test.py" "$3" "$4" "${@:5}"
