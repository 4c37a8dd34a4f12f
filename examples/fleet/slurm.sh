#!/usr/bin/env bash
# Eight tuners, one GPU each, on one PostgreSQL database: claims in it divide the problems.
#
#   export NSA_AUTOTUNE_DB=postgresql+psycopg://tuner@db.example.org/nsa   # the password in ~/.pgpass
#   sbatch examples/fleet/slurm.sh --preset gqa16-d128 --seq 8k..128k --budget normal
#
# A task that is cancelled, preempted or lost may be started again at any time: what it had is taken over.
#SBATCH --job-name=nsa-autotune
#SBATCH --array=0-7
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@60
#SBATCH --output=nsa-autotune-%A_%a.log
set -euo pipefail

: "${NSA_AUTOTUNE_DB:?set it to postgresql+psycopg://USER@HOST/NAME}"

# The process takes the shell's place, so that the signal before the time limit reaches it: it gives its claims back.
exec nsa-autotune tune --db "$NSA_AUTOTUNE_DB" --jobs "${SLURM_CPUS_PER_TASK:-8}" "$@"
