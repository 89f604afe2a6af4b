#!/usr/bin/env bash
# Restarts a training command until it has finished: launch/keep_going.sh python train.py --config=... --workdir=...
# What happens depends on the exit status of the command:
#   0      finished: this script ends
#   2      bad input, which a restart would not fix: this script ends
#   75     stopped by a signal, after saving a checkpoint: restart at once, unless this script got the signal too
#   other  failure of this process or of another process of the run: restart after PAUSE seconds, at most
#          MAX_FAILURES times in a row; a failure after more than half an hour of work starts a new row
# Run the same command on every host of a run: a process that restarts first waits for the others.
set -u
max_failures=${MAX_FAILURES:-5} pause=${PAUSE:-10} failures=0 stopping='' child=''
trap 'stopping=yes; [ -n "$child" ] && kill -TERM "$child" 2>/dev/null' TERM INT HUP

while true; do
    began=$SECONDS
    "$@" &
    child=$!
    wait "$child"; status=$?
    if [ -n "$stopping" ]; then # a trapped signal interrupts `wait` before the command ends
        wait "$child"; again=$?
        if [ "$again" -ne 127 ]; then status=$again; fi
        while kill -0 "$child" 2>/dev/null; do wait "$child"; status=$?; done
    fi
    if [ "$status" -eq 0 ] || [ "$status" -eq 2 ] || [ -n "$stopping" ]; then exit "$status"; fi
    if [ "$status" -ne 75 ]; then
        if [ $((SECONDS - began)) -gt 1800 ]; then failures=0; fi
        failures=$((failures + 1))
        if [ "$failures" -gt "$max_failures" ]; then
            echo "keep_going: stopping after $failures failures in a row, the last with status $status" >&2
            exit "$status"
        fi
        sleep "$pause"
    fi
    echo "keep_going: status $status; restarting" >&2
done
