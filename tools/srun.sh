#!/usr/bin/env bash
# Shared by slurm_train.sh and slurm_test.sh: srun.sh PARTITION JOB_NAME SCRIPT [arguments].
set -euo pipefail
# shellcheck disable=SC2086  # SRUN_ARGS may contain several words
exec srun --partition="$1" \
    --job-name="$2" \
    --gres="gpu:${GPUS_PER_NODE:-8}" \
    --ntasks="${GPUS:-8}" \
    --ntasks-per-node="${GPUS_PER_NODE:-8}" \
    --cpus-per-task="${CPUS_PER_TASK:-8}" \
    --kill-on-bad-exit=1 \
    ${SRUN_ARGS:-} \
    "${PYTHON:-python}" -u "${@:3}" --launcher slurm
