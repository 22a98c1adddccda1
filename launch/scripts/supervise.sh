#!/usr/bin/env bash
# Runs a command again until it ends with status 0; each start goes on from the newest checkpoint:
#
#   bash launch/scripts/supervise.sh bash launch/scripts/one_node.sh train lightningdit CONFIG key=value …
#
# It stops, with the status of the run, where another start would end the same way (2: usage, data, disk; 65: numbers
# that are not finite) or was not wished for (130: Ctrl-C), and after MAX_STARTS starts in a row without progress: the
# newest checkpoint and the last row of the log are at no later step than before. A signal to it (SIGTERM, SIGINT;
# SIGUSR1 and SIGHUP as SIGTERM, since launchers die of them while the run still saves) goes to the command, and it ends
# with that.
#
# RUN_DIR      the run's directory (default: as the command's main process says, where that runs on this machine)
# MAX_STARTS   starts in a row without progress that are too many (default: 5)
# PAUSE        seconds before the first start anew, doubled with each that made no progress, at most 60 (default: 1); 60
#              times as many where the directory or the port was in use (69), as by a run that is just ending
set -uo pipefail
[ $# -gt 0 ] || { echo "usage: supervise.sh COMMAND …" >&2; exit 2; }
max_starts="${MAX_STARTS:-5}" pause="${PAUSE:-1}"
for value in "$max_starts" "$pause"; do
    [[ "$value" =~ ^[0-9]{1,9}$ ]] || { echo "MAX_STARTS $max_starts, PAUSE $pause: not whole numbers" >&2; exit 2; }
done
max_starts=$((10#$max_starts)) pause=$((10#$pause))  # 08 is no octal number
LIGHTNINGDIT_LAST_EXIT="$(mktemp)" || exit 2
export LIGHTNINGDIT_LAST_EXIT
trap 'rm -f "$LIGHTNINGDIT_LAST_EXIT"' EXIT
child="" stopping=""

# What the run's main process wrote down of a key; "" where it did not.
said() {
    local value
    value="$(sed -n -e "s/^ *\"$1\": \"\(.*\)\",\{0,1\}$/\1/p" -e "s/^ *\"$1\": \([^\",]*\),\{0,1\}$/\1/p" \
        "$LIGHTNINGDIT_LAST_EXIT")"
    printf %b "${value//\\\"/\"}"
}

# The status of the run: launchers end with statuses of their own, even with 0 where one of them was killed.
run_status() {
    local launcher="$1" own
    own="$(said status)"
    if [ "$own" = null ] && [ "$launcher" -eq 0 ]; then
        echo 74
    elif [[ "$own" =~ ^[0-9]+$ ]] && [ "$own" -ne 0 ]; then
        echo "$own"
    else
        echo "$launcher"
    fi
}

run_directory() { if [ -n "${RUN_DIR:-}" ]; then echo "$RUN_DIR"; else said directory; fi; }

# The last step that the run's directory knows of: of whole checkpoints, and of the log.
last_step() {
    local directory step=-1 found
    directory="$(run_directory)"
    if [ -n "$directory" ]; then
        for found in "$directory"/checkpoints/step_*/manifest.json; do
            found="${found%/manifest.json}" found="${found##*/step_}"
            [[ "$found" =~ ^[0-9]+$ ]] && ((10#$found > step)) && step=$((10#$found))
        done
        found="$(tail -n 1 "$directory/metrics.jsonl" 2>/dev/null | grep -o '"step": *[0-9]*' | head -n 1)"
        found="${found##*[: ]}"
        [ -n "$found" ] && ((10#$found > step)) && step=$((10#$found))
    fi
    echo "$step"
}

# A launcher that was killed may leave processes that are just ending: they hold the lock of the run's directory. A lock
# that lasts longer is another run's, or left behind: the program knows which.
wait_for_lock() {
    local lock owner
    lock="$(run_directory)/.lock"
    for _ in $(seq 60); do
        [ -z "$stopping" ] || return 0
        owner="$(sed -n 's/^.*"pid": *\([0-9]*\).*$/\1/p' "$lock" 2>/dev/null)"
        [ -n "$owner" ] && kill -0 "$owner" 2>/dev/null && grep -q "\"host\": *\"$(hostname)\"" "$lock" || return 0
        sleep 1
    done
}

forward() {
    stopping="$1"
    [ -z "$child" ] || kill "-$1" "$child" 2>/dev/null
}
trap "forward INT" INT
trap "forward TERM" TERM USR1 HUP

# Waits for the end of `child` → `status`.
await_child() {
    local ended
    while :; do # a trapped signal ends `wait` early, with a status of its own
        wait "$child"
        status=$?
        kill -0 "$child" 2>/dev/null || break
    done
    if [ "$status" -gt 128 ]; then # the child may have ended while the trap ran
        wait "$child" 2>/dev/null
        ended=$?
        [ "$ended" -eq 127 ] || status="$ended"
    fi
    child=""
}

# Where this script is killed, its command gets SIGTERM.
tied=()
if setpriv --pdeathsig TERM true 2>/dev/null; then tied=(setpriv --pdeathsig TERM); fi
set -m # a process group of its own, in which Ctrl-C reaches the command through this script alone
without=0 best="$(last_step)" wait_seconds="$pause" status=0
while :; do
    : >"$LIGHTNINGDIT_LAST_EXIT"
    [ -z "$stopping" ] || exit "$((status == 0 ? 75 : status))"
    "${tied[@]}" "$@" &
    child=$!
    [ -z "$stopping" ] || kill "-$stopping" "$child" # that came between these lines
    await_child
    status="$(run_status "$status")"
    [ "$status" -ne 0 ] || exit 0
    [ -z "$stopping" ] || exit "$status"
    case "$status" in
    2 | 65 | 126 | 127 | 130)
        reason="$(said reason)"
        echo "[supervise] ended with status $status${reason:+ ($reason)}: not started again" >&2
        exit "$status"
        ;;
    esac
    step="$(last_step)"
    if ((step > best)); then
        best="$step" without=0 wait_seconds="$pause"
    else
        without=$((without + 1))
        if ((without >= max_starts)); then
            echo "[supervise] status $status, and no progress since step $best in $without starts: given up" >&2
            exit "$status"
        fi
    fi
    this_pause="$wait_seconds"
    [ "$status" -ne 69 ] || this_pause=$((60 * pause))
    echo "[supervise] ended with status $status at step $step; starts again in $this_pause s" >&2
    sleep "$this_pause" &
    child=$!
    wait "$child"
    child=""
    wait_for_lock
    ((without == 0)) || wait_seconds=$((2 * wait_seconds > 60 ? 60 : 2 * wait_seconds))
done
