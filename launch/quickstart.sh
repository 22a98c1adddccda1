#!/usr/bin/env bash
# The whole pipeline on handwritten digits: tokenizer, latents, transformer, samples, evaluation. Arguments go to
# `python -m launch quickstart` (--seed N, --output DIR, …).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/launch/setup_env.sh"
setup_environment
# glibc returns large blocks to the system at every free and gets them back page by page: a tenth to a quarter of a
# CPU step.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_TOP_PAD_=268435456
# OpenMP's threads wait for each other by spinning; where another process wants their core, that costs three to eight
# times the step. Spinning briefly costs nothing that shows, and no result changes.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-10000}"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m launch quickstart "$@"
