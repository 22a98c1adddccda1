#!/usr/bin/env bash
# Everything that needs a GPU, within a time limit, the most telling first:
#
#     bash bench/gpu.sh OUT_DIR [MINUTES]        (25 minutes unless said otherwise)
#
# A build of csrc, the tests marked gpu, then python -m bench.step, bench.data and bench.ops, and bench.regress on their
# rows. OUT_DIR gets a log of each part, rows.jsonl and summary.txt; each part stops in time by itself, leaves whole rows,
# and the next one runs whatever became of it. Ends with 1 if a part failed; that no rows of this GPU are committed is no
# failure. Needs torch, triton, pytest, numpy, safetensors, pydantic and this tree; what needs DeepSpeed runs where it is
# installed. PYTHON names another interpreter, GIT_REVISION the revision of a tree without .git.
set -uo pipefail

usage="usage: bash bench/gpu.sh OUT_DIR [MINUTES]"
out="${1:?$usage}"
minutes="${2:-25}"
[[ "$minutes" =~ ^[0-9]+$ && "$minutes" -gt 0 ]] || { echo "MINUTES is $minutes; a whole number. $usage" >&2; exit 2; }

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
mkdir -p "$out" || exit 2
out="$(cd "$out" && pwd)"
cd "$root" || exit 2
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON="$root/.venv/bin/python"
fi
PATH="$(dirname "$(command -v "$PYTHON")"):$PATH"  # the ninja of setup.py lies beside it
export PATH PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

end=$((SECONDS + 60 * minutes))
failed=()
: > "$out/summary.txt"

# Seconds left, times a percentage.
share() { echo $(((end - SECONDS) * $1 / 100)); }

# part NAME SECONDS COMMAND …: its output goes to NAME.log; SECONDS is the limit for a part that does not stop by itself.
part() {
    local name="$1" limit="$2" begun="$SECONDS" status verdict
    shift 2
    ((limit > 0)) || limit=1
    echo "== $name, at most $limit s: $*"
    timeout --kill-after=15 "$limit" "$@" 2>&1 | tee "$out/$name.log"
    status="${PIPESTATUS[0]}"
    case "$name $status" in
        *" 0") verdict=ok ;;
        "regress 2") verdict="nothing to compare with" ;;
        *" 124" | *" 137") verdict="cut off" ;;
        *) verdict="failed with status $status" ;;
    esac
    [[ "$verdict" == ok || "$verdict" == nothing* ]] || failed+=("$name")
    printf '%-12s %-24s %4d s\n' "$name" "$verdict" "$((SECONDS - begun))" >> "$out/summary.txt"
}

# Minutes that a part is told to keep to, of its limit in seconds: the rest is for what it has begun.
soft() { awk -v seconds="$1" 'BEGIN { printf "%.2f", 0.85 * seconds / 60 }'; }

part machine 60 "$PYTHON" -c '
import json, torch
from bench.rows import machine
print(json.dumps(machine("cuda" if torch.cuda.is_available() else "cpu"), indent=1))'

# The CUDA kernels, for the GPU here; where there is no nvcc this says so and succeeds.
part build 300 "$PYTHON" setup.py --quiet build_ext --inplace

# Files without such tests may import packages that this machine lacks.
mapfile -t files < <(grep -l 'pytest\.mark\.gpu' tests/test_*.py)
limit="$(share 25)"
# Most of the time compilers are at work, on one core each: several processes, with 20 GB of the device at most.
workers=()
"$PYTHON" -c 'import xdist' 2> /dev/null && workers=(-n 6 --maxschedchunk 4 --max-worker-restart 60)
part tests "$limit" "$PYTHON" -m pytest -p bench.deadline -p bench.lost_device -p no:cacheprovider "${workers[@]}" \
    --minutes "$(soft "$limit")" -q -m gpu --continue-on-collection-errors "${files[@]}"

# Four ways to train, by turns: up to 45 s of steps of each; compiling them takes the rest.
limit="$(share 60)"
seconds=$((limit / 16 < 45 ? limit / 16 + 1 : 45))
part step "$limit" "$PYTHON" -m bench.step --quick --seconds "$seconds" --out "$out/rows.jsonl"

part data 60 "$PYTHON" -m bench.data --seconds 2 --out "$out/rows.jsonl"

# DeepSpeed's optimizer is compiled on the spot, for a minute. A backend that has lost the device to a test would take
# everybody else's rows with it.
without=(--without deepspeed-fused-adam)
for backend in cuda triton; do
    grep -qE "crashed while running .*-$backend-|-$backend-.* lost the device" "$out/tests.log" \
        && without+=(--without "$backend")
done
limit="$(share 85)"
part ops "$limit" "$PYTHON" -m bench.ops --minutes "$(soft "$limit")" --seconds 0.3 "${without[@]}" \
    --out "$out/rows.jsonl"

# Committed rows may be of more steps than those, and of more ops than there was time for.
partial=(--partial step)
if ! grep -q '^ops *ok' "$out/summary.txt" || grep -q '^time is up' "$out/ops.log"; then
    partial+=(--partial op)
fi
limit="$(share 100)"
part regress "$limit" "$PYTHON" -m bench.regress "$out/rows.jsonl" --minutes "$(soft "$limit")" "${partial[@]}"

{
    tail -n 1 "$out/tests.log"
    grep -hoE "worker '.*' crashed while running .*|[^ ]+ lost the device: .*" "$out/tests.log" | sort -u
    grep -h ' images/s' "$out/step.log"
    grep -h '^best against best' "$out/data.log"
    grep -E '^(copy|matmul|time is up|rows:)| (triton|cuda) +[0-9.]+ µs' "$out/ops.log"
    cat "$out/regress.log"
    ((${#failed[@]} == 0)) && echo "all parts ok" || echo "not ok: ${failed[*]}"
} >> "$out/summary.txt"
echo "== summary ($out/summary.txt)"
cat "$out/summary.txt"
((${#failed[@]} == 0))
