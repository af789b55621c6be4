#!/bin/bash
# A Slurm array of runs, one a seed, that are started again after preemption and when their time is up, and go on
# from their last checkpoint:
#
#   sbatch examples/slurm.sh env=hopper-medium agent=recommended
#
#SBATCH --job-name=cpql
#SBATCH --array=0-4
#SBATCH --cpus-per-task=1
#SBATCH --mem=8G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@180
#SBATCH --open-mode=append
#SBATCH --output=slurm-%A_%a.log
# For a GPU: #SBATCH --gpus=1, and device=cuda among the words.

# SIGTERM, three minutes before the end or from preemption, saves the run and ends it with 130.
trap 'kill -TERM "$training"; stopped=yes' TERM
stopped=no
cpql-train "$@" seed="$SLURM_ARRAY_TASK_ID" resume=auto &
training=$!
wait "$training"
status=$?
if [ "$stopped" = yes ]; then  # which ended the wait, not the training
    wait "$training"
    status=$?
fi
if [ "$status" -eq 130 ]; then
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
fi
exit "$status"
