#!/usr/bin/env bash
# Trains on TPUs of a GKE cluster through xpk, with the image of docker/tpu.Dockerfile. Read docs/pods.md first.
set -euo pipefail

: "${CLUSTER:?name of a cluster made with: xpk cluster create}" "${PROJECT:?}" "${ZONE:?}"
: "${IMAGE:?registry path of the image}" "${TYPE:=v5p-32}" "${SLICES:=1}"
: "${RUNS:=/runs}"   # where the cluster's shared storage is mounted in the pods (xpk storage attach)
: "${CONFIG:=configs/blip3o_next_3b.py:pretrain}" "${RUN:=pretrain}"

xpk workload create --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" \
    --workload="blip3o-$RUN" --tpu-type="$TYPE" --num-slices="$SLICES" --docker-image="$IMAGE" \
    --command="$(printf '%q ' python train.py --config="$CONFIG" --workdir="$RUNS/$RUN" "$@")"
