# shellcheck shell=bash
# What all scripts that launch set; source it. PYTHON comes from launch/setup_env.sh.
_scripts="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$_scripts/../.." && pwd)"
source "$root/launch/setup_env.sh"
setup_environment dali
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# A launcher starts one process per GPU, and each would start a thread per core.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Blocks of changing size (validation, checkpoints) would otherwise split the pool.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
