#!/usr/bin/env bash
# Runs a program of this project on the nodes of a hostfile (lines such as `node-0 slots=8`):
#
#   HOSTFILE=hosts bash launch/scripts/many_nodes.sh train lightningdit CONFIG key=value …
#
# HOSTFILE     the nodes and their GPUs; the tree, the data and the output directory have the same path on each
# NODE_RANK    where nodes cannot reach each other by ssh: start this script on every one of them, with its line in the
#              hostfile counted from 0 (a scheduler knows it, such as $SLURM_NODEID); else start it once, on any node
# MASTER_ADDR  address of the first node (default: its name in the hostfile)
# MASTER_PORT  port the processes meet at (default: 29500)
set -euo pipefail
: "${HOSTFILE:?names no file; give HOSTFILE=path with lines such as node-0 slots=8}"
[ -r "$HOSTFILE" ] || { echo "HOSTFILE $HOSTFILE cannot be read" >&2; exit 2; }
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
first="$(sed -n 's/^[[:space:]]*\([^#[:space:]]\{1,\}\).*/\1/p' "$HOSTFILE" | head -n 1)"
ssh=()
[ -z "${NODE_RANK:-}" ] || ssh=(--no_ssh --node_rank "$NODE_RANK")
exec "$PYTHON" -m deepspeed.launcher.runner --hostfile "$HOSTFILE" --master_addr "${MASTER_ADDR:-$first}" \
    --master_port "${MASTER_PORT:-29500}" "${ssh[@]}" --module launch "$@"
