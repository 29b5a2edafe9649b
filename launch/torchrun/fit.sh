#!/bin/bash
# On every node: MASTER_ADDR=... NODE_RANK=... NNODES=2 launch/torchrun/fit.sh -c CONFIG -c launch/configs/ddp8.yaml
set -euo pipefail
torchrun --nnodes="${NNODES:-1}" --node-rank="${NODE_RANK:-0}" --nproc-per-node="${GPUS:-8}" \
  --master-addr="${MASTER_ADDR:-localhost}" --master-port="${MASTER_PORT:-29500}" \
  --module launch.cli fit --trainer.num_nodes="${NNODES:-1}" "$@"
