#!/usr/bin/env bash
# Trains on a Cloud TPU slice: scripts/tpu_pod.sh create|setup|train|log|delete. Read docs/pods.md first.
# The same `train` after a preemption resumes.
set -euo pipefail

: "${NAME:=blip3o}" "${ZONE:?zone of the TPU, such as us-east5-a}"
: "${TYPE:=v5p-32}" "${VERSION:=v2-alpha-tpuv5}"           # accelerator and its VM image
: "${REPOSITORY:?git URL of this code, readable from the TPU}" "${COMMIT:=main}"
: "${BUCKET:?bucket for runs, without gs://}"               # every host mounts it at the same place
: "${CONFIG:=configs/blip3o_next_3b.py:pretrain}" "${RUN:=pretrain}"

quoted() { printf '%q ' "$@"; }  # for the remote shell
everywhere() { gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"; }

case "${1:?create, setup, train, log or delete}" in
create)
    gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" --version="$VERSION" "${@:2}"
    ;;
setup)
    everywhere "set -e
        command -v gcsfuse > /dev/null || { echo 'install gcsfuse on the image first, see docs/pods.md'; exit 1; }
        mkdir -p ~/runs
        mountpoint -q ~/runs || gcsfuse --implicit-dirs $(quoted "$BUCKET") ~/runs
        test -d ~/blip3o_jax || git clone $(quoted "$REPOSITORY") ~/blip3o_jax
        cd ~/blip3o_jax
        git fetch origin $(quoted "$COMMIT")
        git checkout --detach FETCH_HEAD
        python3 -m venv ~/venv
        ~/venv/bin/pip install -e . 'jax[tpu]' -c constraints/py3\$(python3 -c 'import sys; print(min(sys.version_info.minor, 12))').txt"
    ;;
train)
    # one process per host; they find each other. Further flags (--config.KEY=VALUE) are passed on.
    everywhere "cd ~/blip3o_jax && nohup ~/venv/bin/python train.py --workdir=\$HOME/runs/$(quoted "$RUN") \
        $(quoted --config="$CONFIG" "${@:2}") \
        > ~/train.log 2>&1 &"
    ;;
log)
    gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=0 --command="tail -n 50 -f ~/train.log"
    ;;
delete)
    gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE"
    ;;
*)
    echo "error: got $1 - expected create, setup, train, log or delete" >&2
    exit 2
    ;;
esac
