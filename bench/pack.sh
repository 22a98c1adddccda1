#!/usr/bin/env bash
# Packs what a CUDA machine without a network needs beside this tree, and prints the lines that use it there:
#
#     bash bench/pack.sh DIR [--python 3.12] [--with NAME …] [--headers FOLDER]
#
# bench/pack.py says what that is. Runs in an environment that has this project's packages: PYTHON, else .venv at the
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
