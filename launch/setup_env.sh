#!/usr/bin/env bash
# Sets PYTHON to an interpreter that can run this project; source it from a script of this repository.
#
# An active virtual or conda environment whose torch is the pinned one is used as it is: what it lacks is added, what it
# has is left alone. Otherwise .venv at the root of the repository is made once and brought up to date whenever
# pyproject.toml changes. Arguments: extras (test, dali). The CUDA kernels are built in place when csrc has changed.

_say() { printf '[setup] %s\n' "$*" >&2; }

_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
_pinned_torch="$(sed -n 's/.*"torch==\([0-9.]*\)".*/\1/p' "$_root/pyproject.toml")"

_python_of_active_environment() {
    local prefix="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" found
    [ -n "$prefix" ] && [ -x "$prefix/bin/python" ] || return 1
    found="$("$prefix/bin/python" -c 'import importlib.metadata as m, sys
assert sys.version_info >= (3, 11)
print(m.version("torch"))' 2>/dev/null)" || return 1
    [ "${found%%+*}" = "$_pinned_torch" ] || return 1
    printf '%s' "$prefix/bin/python"
}

_new_enough_python() {
    local candidate
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { printf '%s' "$candidate"; return; }
    done
    _say "no Python ≥ 3.11 found (on Debian or Ubuntu: apt install python3 python3-venv)"
    return 1
}

# The CUDA kernels, where they can be built and are of use: on a machine with a GPU, and to test them.
_build_extension() {
    local stamp="$_root/build/.extension" want
    [ "${LIGHTNINGDIT_CUDA:-1}" != 0 ] || return 0
    [[ " $* " == *" test "* ]] || command -v nvidia-smi >/dev/null 2>&1 || return 0
    want="$(find "$_root/setup.py" "$_root/csrc" -type f -print0 | sort -z | xargs -0 cat | cksum)"
    want+=" $("$PYTHON" --version) $_pinned_torch ${LIGHTNINGDIT_CUDA_ARCHS:-}"
    [ "$(cat "$stamp" 2>/dev/null)" != "$want" ] || return 0
    _say "building the CUDA kernels (some minutes the first time)"
    mkdir -p "$_root/build"
    (cd "$_root" && "$PYTHON" setup.py --quiet build_ext --inplace) >"$_root/build/extension.log" 2>&1 ||
        { _say "the CUDA kernels do not build:"; cat "$_root/build/extension.log" >&2; return 1; }
    sed -n 's/^lightningdit: /[setup] /p' "$_root/build/extension.log" >&2
    printf '%s' "$want" >"$stamp"
}

setup_environment() {
    _set_python "$@" && _build_extension "$@"
}

_set_python() {
    local extras stamp want absent
    extras="$(IFS=,; printf '%s' "$*")"
    if PYTHON="$(_python_of_active_environment)"; then
        _say "using the active environment ${VIRTUAL_ENV:-$CONDA_PREFIX} (torch $_pinned_torch)"
        mapfile -t absent < <("$PYTHON" "$_root/launch/scripts/check_env.py" "$_root/pyproject.toml" "$@" | sed '/^$/d')
        [ "${#absent[@]}" -eq 0 ] && return
        _say "adding what it lacks: ${absent[*]}"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check "${absent[@]}"
        return
    fi
    PYTHON="$_root/.venv/bin/python"
    stamp="$_root/.venv/.installed"
    want="$(cksum <"$_root/pyproject.toml") $extras"
    # An interrupted or pip-less venv has a python, but no pip: made anew.
    if [ ! -f "$stamp" ] && ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
        rm -rf "$_root/.venv"
        local base
        base="$(_new_enough_python)" || return 1
        _say "making $_root/.venv with $("$base" --version)"
        "$base" -m venv "$_root/.venv" || { rm -rf "$_root/.venv"; _say "venv failed (on Debian or Ubuntu: apt install python3-venv)"; return 1; }
    fi
    if [ ! -f "$stamp" ] || ! grep -qxF "$want" "$stamp"; then
        _say "installing the pinned packages (a few minutes the first time)"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -e "$_root${extras:+[$extras]}" || return 1
        grep -qsF "$(cksum <"$_root/pyproject.toml")" "$stamp" || : >"$stamp"
        printf '%s\n' "$want" >>"$stamp"
    fi
    _say "using $PYTHON"
}
