#!/bin/bash
# neartune on several machines under Slurm:  sbatch deploy/slurm-train.sh recipe.yaml [key=value …]
#
# One torchrun on each machine starts a process for each of its GPUs. recipe, output_dir and HF_HOME must be on a file system
# that all machines share; train_batch_size must be a multiple of all processes. In the recipe leave `processes` at auto.
# Five minutes before its time is up, or when it is preempted, the job writes a checkpoint and puts itself back into the queue:
# the same command goes on from there. Any other failure ends it; the log says why.
#SBATCH --job-name=neartune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@300
#SBATCH --open-mode=append
#SBATCH --output=neartune-%j.log

set -u
RECIPE=${1:?usage: sbatch slurm-train.sh recipe.yaml [key=value …]}
shift
MIRROR=${MIRROR:-http://mirror:8090}
GPUS=${SLURM_GPUS_ON_NODE:-1}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export HF_HOME=${HF_HOME:-$PWD/hf}
export OMP_NUM_THREADS=$((${SLURM_CPUS_PER_TASK:-1} / GPUS > 0 ? ${SLURM_CPUS_PER_TASK:-1} / GPUS : 1))
# How long torchrun lets its processes finish a step and write the checkpoint: less than the 300 s above.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=270
export MIRROR GPUS MASTER_ADDR MASTER_PORT RECIPE

is_stopping=0
stop() {
    is_stopping=1
    scancel --signal=TERM "$SLURM_JOB_ID" # the steps, not this script
}
trap stop TERM

# SLURM_NODEID is another on each machine, so it is read there.
srun --kill-on-bad-exit=1 bash -c 'exec torchrun --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" \
    --nproc-per-node="$GPUS" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" \
    -m neartune train --config "$RECIPE" --use_mirror "$MIRROR" "$@"' neartune "$@" &
step=$!
wait "$step"
status=$?
if [ "$is_stopping" = 1 ]; then
    wait "$step" # the trap ended the first wait
    scontrol requeue "$SLURM_JOB_ID"
    exit 143
fi
exit "$status"
