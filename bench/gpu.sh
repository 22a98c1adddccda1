#!/usr/bin/env bash
# Everything that needs a GPU, within a time limit, the most important first:
#
#     bash bench/gpu.sh OUT_DIR [MINUTES [OPTION …]]        (25 minutes by default)
#
# Below 20 minutes this is python -m bench.triage, which takes the options; what follows is about longer runs.
#
# A build of csrc, the tests marked gpu, then python -m bench.step, the representative cases of bench.ops, bench.gemms,
# bench.sampling, bench.tokenizer, bench.data of latents and of images, all other cases of bench.ops, and bench.regress
# on their rows. Below 40 minutes, steps, sampling and tokenizer are the short choice of --quick. OUT_DIR gets
# summary.txt, rows.jsonl, log.txt and, in logs.tgz, what each part printed; each part stops in time by itself, leaves
# whole rows, and the next one runs whatever became of it. Ends with 1 if a part failed; that no rows of this GPU are
# committed is no failure.
#
# Needs torch, triton, pytest, numpy, safetensors, pydantic and this tree; sampling also torchdiffeq, torchvision and
# PyYAML, training steps DeepSpeed, those of the tokenizer timm and lpips, images Pillow, torchvision and DALI; where one
# is not installed, a row states it.
# PYTHON names another interpreter, GIT_REVISION the revision of a tree without .git.
set -uo pipefail

usage="usage: bash bench/gpu.sh OUT_DIR [MINUTES [OPTION …]]"
out="${1:?$usage}"
minutes="${2:-25}"
[[ "$minutes" =~ ^[0-9]+$ && "$minutes" -gt 0 ]] || { echo "MINUTES is $minutes; a whole number. $usage" >&2; exit 2; }

minutes="$((10#$minutes))"  # 08 is no octal number

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
here="$PWD"
mkdir -p "$out" || exit 2
out="$(cd "$out" && pwd)"
options=("${@:3}")
for ((i = 1; i < ${#options[@]}; i++)); do  # a path is meant from where the caller is
    [[ "${options[i - 1]}" == --from && "${options[i]}" != /* ]] && options[i]="$here/${options[i]}"
done
[[ "${PYTHON:-/}" == */* && "${PYTHON:-/}" != /* ]] && PYTHON="$here/$PYTHON"
cd "$root" || exit 2
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON="$root/.venv/bin/python"
fi
PATH="$(dirname "$(command -v "$PYTHON")"):$PATH"  # the ninja of setup.py lies beside it
export PATH PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

((minutes < 20)) && exec "$PYTHON" -m bench.triage "$out" --minutes "$minutes" "${options[@]}"
(($# <= 2)) || { echo "$minutes minutes take no options: ${*:3}. $usage" >&2; exit 2; }

end=$((SECONDS + 60 * minutes))
failed=()
work="$(mktemp -d)" || exit 2
logs="$work/logs"
mkdir "$logs"
: > "$out/summary.txt"
: > "$out/log.txt"
trap 'tar -czf "$out/logs.tgz" -C "$work" logs; rm -r "$work"' EXIT

# Seconds left, times a percentage.
share() { echo $(((end - SECONDS) * $1 / 100)); }

# part NAME SECONDS COMMAND …: its output goes to NAME.log; SECONDS is the limit for a part that does not stop by itself.
part() {
    local name="$1" limit="$2" begun="$SECONDS" words status verdict
    shift 2
    ((limit > 0)) || limit=1
    words="$*"
    echo "== $name, at most $limit s: ${words//$'\n'/ }" | tee -a "$out/log.txt"
    timeout --kill-after=15 "$limit" "$@" 2>&1 | tee "$logs/$name.log"
    status="${PIPESTATUS[0]}"
    case "$name $status" in
        *" 0") verdict=ok ;;
        "regress 2") verdict="nothing to compare with" ;;
        *" 124" | *" 137") verdict="cut off" ;;
        *) verdict="failed with status $status" ;;
    esac
    [[ "$verdict" == ok || "$verdict" == nothing* ]] || failed+=("$name")
    printf '%-12s %-24s %4d s\n' "$name" "$verdict" "$((SECONDS - begun))" | tee -a "$out/log.txt" >> "$out/summary.txt"
}

# Minutes for --minutes of a part, of its limit in seconds: the rest is for the measurement it has begun.
soft() { awk -v seconds="$1" 'BEGIN { printf "%.2f", 0.85 * seconds / 60 }'; }

part machine 60 "$PYTHON" -c '
import json, torch
from bench.measure.rows import machine
print(json.dumps(machine("cuda" if torch.cuda.is_available() else "cpu"), indent=1))'

# The CUDA kernels, for the GPU here; where there is no nvcc this prints it and succeeds.
part build 300 "$PYTHON" setup.py --quiet build_ext --inplace

# Files without such tests may import packages that this machine lacks.
mapfile -t files < <(grep -lE 'pytest\.mark\.gpu|^def test.*hopper' tests/test_*.py)
limit="$(share 15)"
# Most of the time compilers are at work, on one core each: several processes.
workers=()
"$PYTHON" -c 'import xdist' 2> /dev/null && workers=(-n 8 --maxschedchunk 4 --max-worker-restart 60)
plugins=(-p tests.plugins.deadline -p tests.plugins.lost_device -p tests.plugins.memory -p no:cacheprovider)
part tests "$limit" "$PYTHON" -m pytest "${plugins[@]}" "${workers[@]}" --minutes "$(soft "$limit")" -q -m gpu \
    --continue-on-collection-errors "${files[@]}"

quick=()
((minutes < 40)) && quick=(--quick)

# bench NAME PERCENT MODULE ARGUMENTS …: a part of the bench that keeps to that share of the time left.
bench() {
    local limit
    limit="$(share "$2")"
    part "$1" "$limit" "$PYTHON" -m "$3" --minutes "$(soft "$limit")" "${@:4}" --out "$out/rows.jsonl"
}

# Variants of steps, by turns: up to 45 s of steps of each; compiling them takes the rest.
seconds="$(($(share 35) / 16 + 1))"
bench step 35 bench.step "${quick[@]}" --seconds "$((seconds < 45 ? seconds : 45))"

# DeepSpeed's optimizer is compiled on the spot, for a minute. A backend that has lost the device to a test would take
# the rows of all others with it.
without=(--without deepspeed-fused-adam)
for backend in cuda triton; do
    grep -qE "crashed while running .*-$backend-|-$backend-.* lost the device" "$logs/tests.log" \
        && without+=(--without "$backend")
done
bench ops 25 bench.ops --quick --seconds 0.3 "${without[@]}"
bench gemms 20 bench.gemms --seconds 0.3
bench sampling 35 bench.sampling "${quick[@]}" --seconds 2
bench tokenizer 60 bench.tokenizer "${quick[@]}" --seconds 2
part data 60 "$PYTHON" -m bench.data --seconds 2 --out "$out/rows.jsonl"
bench images 30 bench.data --images --seconds 2
bench more 85 bench.ops --after-quick --seconds 0.3 "${without[@]}"

# Committed rows may be of more than this run had time for.
partial=(--partial step --partial sampling --partial tokenizer)
if (($(grep -cE '^(ops|more) +ok' "$out/summary.txt") < 2)) || grep -qE '^(the )?time is up' "$logs"/{ops,more}.log; then
    partial+=(--partial op)
fi
limit="$(share 100)"
part regress "$limit" "$PYTHON" -m bench.regress "$out/rows.jsonl" --minutes "$(soft "$limit")" "${partial[@]}"

{
    tail -n 1 "$logs/tests.log"
    grep -hoE "worker '.*' crashed while running .*|[^ ]+ lost the device: .*" "$logs/tests.log" | sort -u
    grep -h ' images/s' "$logs"/{step,sampling,tokenizer}.log | grep -v '^so far'
    grep -h ' mean over the step' "$logs/gemms.log"
    grep -hE '^best against best|over pil' "$logs"/{data,images}.log
    grep -hE '^(copy|matmul|rows:)| (triton|cuda) +[0-9.]+ µs' "$logs"/{ops,more}.log | grep -v '^so far'
    grep -hiE '^(the )?time is up' "$logs"/*.log
    cat "$logs/regress.log"
    ((${#failed[@]} == 0)) && echo "all parts ok" || echo "not ok: ${failed[*]}"
} >> "$out/summary.txt"
echo "== summary ($out/summary.txt)"
cat "$out/summary.txt"
((${#failed[@]} == 0))
