#!/usr/bin/env bash
# Packs wheels and the CUDA extension for a CUDA machine without a network, and prints the lines that install them:
#
#     bash bench/pack.sh DIR [--python 3.12] [--with NAME …] [--headers FOLDER]
#
# bench/pack.py describes them. Runs in an environment that has this project's packages: PYTHON, else .venv at the
# root of the tree, else python3.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python3
    [[ -x "$root/.venv/bin/python" ]] && PYTHON="$root/.venv/bin/python"
fi
PATH="$(dirname "$(command -v "$PYTHON")"):$PATH"  # the ninja of setup.py lies beside it
export PATH PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m bench.pack "$@"
