#!/usr/bin/env bash
# Trains on a Cloud TPU slice, step by step; see docs/tpu_pod.md. Not yet tested on a TPU.
#
#   export NAME=epsanet ZONE=us-west4-a TYPE=v5litepod-256 RUNTIME=v2-alpha-tpuv5-lite
#   export WORKDIR=gs://BUCKET/runs/first DATA=/mnt/disks/data/tensorflow_datasets
#   launch/tpu_pod.sh create [--spot]        creates the slice
#   launch/tpu_pod.sh install GIT_URL        installs Python packages on all workers
#   launch/tpu_pod.sh start OPTIONS...       runs train.py on all workers; OPTIONS: --config=configs/imagenet.py:...
#   launch/tpu_pod.sh watch                  follows the log of worker 0
#   launch/tpu_pod.sh stop                   sends SIGTERM: saves and exits; `start` with the same options continues
#   launch/tpu_pod.sh delete                 deletes the slice
set -euo pipefail
: "${NAME:?}" "${ZONE:?}"
command=${1:?create, install, start, watch, stop or delete}
shift

on() { # WORKER COMMAND
    gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker="$1" --command="$2"
}

case $command in
create)
    gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" --accelerator-type="${TYPE:?}" --version="${RUNTIME:?}" "$@"
    ;;
install)
    # Python on the VM images may be older than 3.11; uv installs a newer one.
    on all "([ -d epsanet_jax ] || git clone ${1:?the address of the repository} epsanet_jax) && cd epsanet_jax &&
        python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --allow-existing --python 3.11 .venv &&
        python3 -m uv pip install --quiet --python .venv/bin/python 'jax[tpu]' gcsfs --editable ."
    ;;
start)
    options=$(printf '%q ' "$@")
    on all "cd epsanet_jax && nohup setsid launch/keep_going.sh .venv/bin/python -u train.py $options \
        --workdir=${WORKDIR:?} --config.data.dir=${DATA:?} > train.log 2>&1 < /dev/null & echo started"
    ;;
watch)
    on 0 'tail -n 50 -f epsanet_jax/train.log'
    ;;
stop)
    on all 'pkill -TERM -f [k]eep_going.sh'
    ;;
delete)
    gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE"
    ;;
*)
    echo "error: unknown command $command; use create, install, start, watch, stop or delete" >&2
    exit 2
    ;;
esac
