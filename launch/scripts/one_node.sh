#!/usr/bin/env bash
# Runs a program of this project on the GPUs of this machine, one process each:
#
#   bash launch/scripts/one_node.sh train lightningdit launch/configs/lightningdit_xl_64ep.yaml data.data_path=/data/latents
#
# GPUS         how many of them (default: all)
# MASTER_PORT  port the processes meet at (default: 29500)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" -m deepspeed.launcher.runner --num_accelerators "${GPUS:--1}" --master_port "${MASTER_PORT:-29500}" \
    --module launch "$@"
