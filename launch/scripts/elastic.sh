#!/usr/bin/env bash
# Runs a program of this project under torchrun, which starts all processes anew where one is lost; each start goes on
# from the newest checkpoint. torchrun knows no statuses: it also starts anew, up to MAX_RESTARTS times, what would end
# the same way (2: usage, data, disk; 65: numbers that are not finite, with a dump each time; 130: Ctrl-C). Start it on
# every node:
#
#   bash launch/scripts/elastic.sh train lightningdit CONFIG key=value …
#
# NODES         how many, such as 4, or 2:4 for whatever comes: the global batch stays the same (default: 1)
# GPUS          processes per node (default: gpu, one for each)
# MAX_RESTARTS  starts anew (default: 20); for a limit on those without progress, put supervise.sh before this script
# RDZV_ID       name of the run, the same on all nodes (default: $SLURM_JOB_ID, else lightningdit)
# MASTER_ADDR   a node that all can reach, the same on all nodes (default: localhost, with one node alone)
# MASTER_PORT   the port that torchrun's processes meet at there (default: 29400)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
nodes="${NODES:-1}"
if [ "$nodes" != 1 ]; then : "${MASTER_ADDR:?is needed for more than one node: a node that all can reach}"; fi
exec "$PYTHON" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "${GPUS:-gpu}" \
    --max-restarts "${MAX_RESTARTS:-20}" --rdzv-backend c10d --rdzv-id "${RDZV_ID:-${SLURM_JOB_ID:-lightningdit}}" \
    --rdzv-endpoint "${MASTER_ADDR:-localhost}:${MASTER_PORT:-29400}" --module launch "$@"
