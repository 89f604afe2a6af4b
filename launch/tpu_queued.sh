#!/usr/bin/env bash
# Trains on a Cloud TPU slice from a queue, spot slices included, until it has finished; see docs/tpu_pod.md.
# Not yet tested on a TPU.
#
#   export NAME=epsanet ZONE=us-west4-a TYPE=v5litepod-256 RUNTIME=v2-alpha-tpuv5-lite
#   export WORKDIR=gs://BUCKET/runs/first DATA=/mnt/disks/data/tensorflow_datasets
#   launch/tpu_queued.sh GIT_URL OPTIONS...       OPTIONS: those of train.py, --config=configs/imagenet.py:...
#
# It requests the slice, waits for it, starts the training with tpu_pod.sh, requests a new slice when this one is
# taken away, and deletes the slice when the training has ended. Run it on a machine that stays on; after a restart
# of this script the same command goes on. QUEUE holds the options of the request, by default --spot.
set -euo pipefail
: "${NAME:?}" "${ZONE:?}" "${TYPE:?}" "${RUNTIME:?}" "${WORKDIR:?}" "${DATA:?}"
url=${1:?the address of the repository}
shift
pause=${PAUSE:-60} pod=$(dirname "$0")/tpu_pod.sh
read -ra queue <<< "${QUEUE:---spot}"

queued() { # SUBCOMMAND OPTIONS...
    gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" "${@:2}"
}

training() { # prints yes or no
    gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=0 \
        --command='pgrep -f [k]eep_going.sh > /dev/null && echo yes || echo no'
}

started=''
while true; do
    state=$(queued describe --format='value(state.state)' 2> /dev/null) || state=''
    echo "tpu_queued: ${state:-no slice is requested}" >&2
    case $state in
    '')
        queued create --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$RUNTIME" "${queue[@]}"
        started=''
        ;;
    ACTIVE)
        running=$(training) || running='' # the slice may be taken away at this moment
        if [ "$running" = no ] && [ -n "$started" ]; then
            gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=0 --command='tail -n 20 epsanet_jax/train.log'
            queued delete --force --quiet
            exit 0
        elif [ "$running" = no ]; then
            if "$pod" install "$url" && "$pod" start "$@"; then started=yes; fi
        elif [ "$running" = yes ]; then
            started=yes
        fi
        ;;
    SUSPENDED | FAILED)
        queued delete --force --quiet
        started=''
        continue
        ;;
    esac
    sleep "$pause"
done
