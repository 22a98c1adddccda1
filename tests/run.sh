#!/usr/bin/env bash
# Sets up the environment if there is none and runs the tests, on as many processes as there are cores (at most 8);
# arguments go to pytest (such as `-n 0` for one process, or a file).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/launch/setup_env.sh"
# Without a GPU the CUDA kernels are for no machine in particular: built for those whose code a test looks at.
command -v nvidia-smi >/dev/null 2>&1 || export LIGHTNINGDIT_CUDA_ARCHS="${LIGHTNINGDIT_CUDA_ARCHS:-sm_80 sm_90a}"
setup_environment test dali
cd "$root"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
workers="$(nproc)"
# One thread each: the processes keep the cores busy.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# By file, in the order of tests/conftest.py. A process that dies ends the run: pytest-xdist would give the files that it
# had finished to another and, at the end, wait for ever.
exec "$PYTHON" -m pytest -n "$((workers < 8 ? workers : 8))" --dist loadfile --no-loadscope-reorder \
    --max-worker-restart 0 "$@"
