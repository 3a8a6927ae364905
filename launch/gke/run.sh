#!/usr/bin/env bash
# Runs a nuner_jax command as a job on Google Kubernetes Engine, on TPUs or GPUs, one pod a machine.
#
# usage: launch/gke/run.sh [--dry-run] NAME COMMAND [FLAG...]
#        launch/gke/run.sh [--dry-run] --list | --logs NAME | --delete NAME
#
#   BUCKET=my-bucket TPU=tpu-v5-lite-podslice TOPOLOGY=4x4 launch/gke/run.sh base train --config=configs/nuner_base.py
#   BUCKET=my-bucket GPU=nvidia-h100-80gb NODES=2 CHIPS=8 launch/gke/run.sh base train --config=configs/nuner_base.py
#
# It copies this repository into the bucket, fills in launch/gke/job.yaml and gives that to kubectl.
# The pods mount the bucket at /mnt/bucket, install the project, and run the command with
# --workdir=/mnt/bucket/runs/NAME. Pods that were taken away come again, and the run resumes.
#
#   --dry-run   print what would be run, and run nothing
#   --list      the jobs
#   --logs      what the run's first pod prints, from the beginning
#   --delete    delete the job; what is in the bucket stays
#
# environment:
#   BUCKET            where the run is kept: with a hierarchical namespace, near the cluster
#   TPU, TOPOLOGY     the nodes' labels gke-tpu-accelerator and gke-tpu-topology: one slice
#   GPU, NODES        the nodes' label gke-accelerator, and how many of them
#   CHIPS             TPU chips or GPUs of a node (default: 4 TPU chips, 8 GPUs)
#   SPOT              1: on spot nodes only
#   IMAGE             of the containers, with Python from 3.11 to 3.13 (default: python:3.12)
#   SERVICE_ACCOUNT   of Kubernetes, which may write to the bucket (default: default)
#   NUNER_EXTRAS      cuda13, or cuda12 for an older driver (default: cuda13)
#   Cluster and namespace are those of kubectl (kubectl config current-context).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/setup.sh
source launch/remote.sh

# Nodes may come minutes apart, and each then installs: the processes wait for each other.
readonly PATIENCE=--join_timeout=1800

main() {
  read_options launch/gke/run.sh "list logs delete" "$@"
  set -- "${WORDS[@]}"
  need kubectl "https://kubernetes.io/docs/tasks/tools"
  if [[ "$ACTION" == list ]]; then
    run kubectl get jobs --selector=app=nuner-jax
    return
  fi
  NAME="${1:-}"
  check_name "$NAME"
  case "${ACTION:-start}" in
    start) start "${@:2}" ;;
    logs) run kubectl logs --follow --container=train \
      --selector="job-name=$NAME,batch.kubernetes.io/job-completion-index=0" --tail=-1 ;;
    delete) run kubectl delete "job/$NAME" "service/$NAME" ;;
  esac
}

start() {
  local manifest packed
  need gcloud "https://cloud.google.com/sdk/docs/install"
  need_variables launch/gke/run.sh BUCKET
  check_command launch/gke/run.sh "${1:-}"
  BUCKET="${BUCKET#gs://}"
  refuse_workdir "$@"
  set -- "$@" "--workdir=/mnt/bucket/runs/$NAME"
  if [[ -n "${TPU:-}" && -n "${GPU:-}" ]]; then
    die "TPU and GPU are both set: one of them"
  elif [[ -n "${TPU:-}" ]]; then
    manifest="$(tpu_manifest "$@")"
  else
    manifest="$(gpu_manifest "$@")"
  fi
  check_code
  check_bucket

  packed="$(mktemp --suffix=.tar.gz)"
  # shellcheck disable=SC2064  # this file's name
  trap "rm -f $(quoted "$packed")" EXIT
  run pack_code "$packed"
  run gcloud storage cp "$packed" "gs://$BUCKET/code/$NAME.tar.gz"
  run kubectl apply --filename=- <<<"$manifest"
  if [[ -n "$DRY_RUN" ]]; then echo "$manifest"; fi
}

# One slice of TPUs: JAX learns from GKE who takes part.
tpu_manifest() {
  local chips nodes
  need_variables launch/gke/run.sh TOPOLOGY
  check_numbers CHIPS
  [[ "$TOPOLOGY" =~ ^[0-9]+(x[0-9]+){1,2}$ ]] || die "TOPOLOGY=$TOPOLOGY is not of the form 4x4 or 4x4x4"
  chips="${CHIPS:-4}"
  nodes=$((${TOPOLOGY//x/*} / chips))
  ((nodes * chips == ${TOPOLOGY//x/*} && nodes)) ||
    die "TOPOLOGY=$TOPOLOGY cannot be divided into nodes of CHIPS=$chips"
  fill "$nodes" "cloud.google.com/gke-tpu-accelerator: $TPU, cloud.google.com/gke-tpu-topology: $TOPOLOGY" \
    "google.com/tpu: $chips" tpu "" launch/local.sh "$@" --distributed "$PATIENCE"
}

# Several GPU nodes find each other by the names of their pods.
gpu_manifest() {
  local cluster
  need_variables launch/gke/run.sh GPU NODES
  check_numbers NODES CHIPS
  # shellcheck disable=SC2153  # they are the user's
  cluster="- {name: COORDINATOR, value: \"$NAME-0.$NAME:12355\"}
        - {name: NUM_PROCESSES, value: \"$NODES\"}
        - name: PROCESS_ID
          valueFrom: {fieldRef: {fieldPath: \"metadata.annotations['batch.kubernetes.io/job-completion-index']\"}}"
  fill "$NODES" "cloud.google.com/gke-accelerator: $GPU" \
    "nvidia.com/gpu: ${CHIPS:-8}" "${NUNER_EXTRAS:-cuda13}" "$cluster" launch/gpu.sh "$@" "$PATIENCE"
}

# check_numbers NAME...: dies if one of these variables is set, and no number.
check_numbers() {
  local name
  for name in "$@"; do
    [[ "${!name:-1}" =~ ^[1-9][0-9]*$ ]] || die "$name=${!name} is no number above 0"
  done
}

# fill NODES SELECTOR LIMITS EXTRAS CLUSTER WORD...: the manifest, for these words as a command.
fill() {
  local manifest word args="" selector="$2"
  if [[ "${SPOT:-}" == 1 ]]; then selector+=', cloud.google.com/gke-spot: "true"'; fi
  for word in "${@:6}"; do
    word="${word//\\/\\\\}"
    args+=", \"${word//\"/\\\"}\""
  done
  manifest="$(<launch/gke/job.yaml)"
  manifest="${manifest//@NAME@/"$NAME"}"
  manifest="${manifest//@BUCKET@/"$BUCKET"}"
  manifest="${manifest//@SERVICE_ACCOUNT@/"${SERVICE_ACCOUNT:-default}"}"
  manifest="${manifest//@IMAGE@/"${IMAGE:-python:3.12}"}"
  manifest="${manifest//@NODES@/"$1"}"
  manifest="${manifest//@FAILURES@/"$((10 * $1))"}"
  manifest="${manifest//@SELECTOR@/"$selector"}"
  manifest="${manifest//@LIMITS@/"$3"}"
  manifest="${manifest//@EXTRAS@/"$4"}"
  manifest="${manifest//@CLUSTER@/"$5"}"
  manifest="${manifest//@ARGS@/"[${args:2}]"}"
  echo "$manifest"
}

main "$@"
