#!/bin/bash
# sbatch launch/slurm/fit.sh -c papers/dfosd/configs/sd21.yaml -c data/configs/lsdir_ffhq.yaml -c launch/configs/ddp8.yaml
#SBATCH --job-name=isr
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=SIGUSR1@90
# Lightning reads SLURM's variables; on SIGUSR1 it saves a checkpoint and requeues the job, which then resumes from it.
set -euo pipefail
srun isr fit --trainer.num_nodes="${SLURM_JOB_NUM_NODES}" "$@"
