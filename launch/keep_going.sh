#!/usr/bin/env bash
# Runs a training command again until it has ended: launch/keep_going.sh python train.py --config=... --workdir=...
#   0    it has ended
#   2    bad input, which another try would not mend
#   75   it was asked to stop and has saved: again at once, unless this script was asked too
#   else a failure, of this process or of another one of the run: again after a pause, MAX_FAILURES times in a row;
#        one that comes after half an hour of work is the first of its row
# The same on every host of a run: whoever comes back first waits for the others.
set -u
max_failures=${MAX_FAILURES:-5} pause=${PAUSE:-10} failures=0 stopping='' child=''
trap 'stopping=yes; [ -n "$child" ] && kill -TERM "$child" 2>/dev/null' TERM INT

while true; do
    began=$SECONDS
    "$@" &
    child=$!
    wait "$child"; status=$?
    if [ -n "$stopping" ]; then # a trapped signal ends `wait` before the command has ended
        wait "$child"; again=$?
        if [ "$again" -ne 127 ]; then status=$again; fi
        while kill -0 "$child" 2>/dev/null; do wait "$child"; status=$?; done
    fi
    if [ "$status" -eq 0 ] || [ "$status" -eq 2 ] || [ -n "$stopping" ]; then exit "$status"; fi
    if [ "$status" -ne 75 ]; then
        if [ $((SECONDS - began)) -gt 1800 ]; then failures=0; fi
        failures=$((failures + 1))
        if [ "$failures" -gt "$max_failures" ]; then
            echo "keep_going: gave up after $failures failures, the last with status $status" >&2
            exit "$status"
        fi
        sleep "$pause"
    fi
    echo "keep_going: status $status; starting again" >&2
done
