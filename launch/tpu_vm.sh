#!/usr/bin/env bash
# Runs a nuner_jax command on all machines of a Cloud TPU, to its end: on spot capacity it makes the
# TPU anew whenever it was taken away, and the run resumes.
#
# usage: launch/tpu_vm.sh [--dry-run] NAME COMMAND [FLAG...]
#        launch/tpu_vm.sh [--dry-run] --list | --logs NAME | --delete NAME
#
#   ZONE=us-west4-a TYPE=v5litepod-16 BUCKET=my-bucket SPOT=1 launch/tpu_vm.sh base train --config=configs/nuner_base.py
#
# It asks for the TPU (a queued resource), copies this repository to its machines, mounts the bucket
# on each at /mnt/bucket, installs the project, starts the command with --distributed and
# --workdir=/mnt/bucket/runs/NAME, and prints what the first machine does. Interrupted, it leaves the
# run alone; the same command finds it again. The TPU is deleted when the run has come to its end,
# and kept, for a look, when it has failed.
#
#   --dry-run   print what would be run, and run nothing
#   --list      the TPUs of the zone
#   --logs      what the run's first machine prints, from the beginning
#   --delete    delete the TPU; what is in the bucket stays
#
# environment:
#   ZONE     of the TPU, such as us-west4-a
#   TYPE     of the TPU, such as v5litepod-16 or v6e-16
#   BUCKET   where the run is kept: with a hierarchical namespace, near the zone
#   SPOT     1: spot capacity, cheaper, which can be taken away at any time (default: on demand)
#   IMAGE    software of the machines (default: the one for the type)
#   KEEP     1: do not delete the TPU at the end
#   POLL     seconds between looks at a TPU that is not ready (default: 30)
#   The project is that of gcloud (gcloud config set project).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
source launch/remote.sh

# No LIBTPU_INIT_ARGS are set: on TPUs XLA overlaps collectives with computation by itself, and what
# else there is, nobody has measured for this project.

main() {
  read_options launch/tpu_vm.sh "list logs delete" "$@"
  set -- "${WORDS[@]}"
  need gcloud "https://cloud.google.com/sdk/docs/install"
  need_variables launch/tpu_vm.sh ZONE
  if [[ "$ACTION" == list ]]; then
    queued list
    return
  fi
  NAME="${1:-}"
  check_name "$NAME"
  case "${ACTION:-start}" in
    start) start "${@:2}" ;;
    logs) on 0 launch/tpu_worker.sh follow ;;
    delete) queued delete "$NAME" --force --quiet ;;
  esac
}

queued() {
  run gcloud compute tpus queued-resources "$@" --zone="$ZONE"
}

# on WORKER WORD...: runs the words in the repository's copy on one machine, by its number, or all.
on() {
  run gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker="$1" \
    --command="cd nuner_jax && $(quoted "${@:2}")"
}

start() {
  need_variables launch/tpu_vm.sh TYPE BUCKET
  check_command launch/tpu_vm.sh "${1:-}"
  BUCKET="${BUCKET#gs://}"
  refuse_workdir "$@"
  check_code
  check_bucket
  until attempt "$@"; do
    say "interrupted; it goes on"
  done
  if [[ "${KEEP:-}" != 1 ]]; then queued delete "$NAME" --force --quiet; fi
}

# Brings the run to its end, and returns 0, or to an interruption that it survives, and returns 1.
# (As a condition it runs without set -e.)
attempt() {
  local status
  acquire || exit
  status="$(first_status)"
  if [[ "$status" == unknown ]] || { [[ "$status" != running ]] && ! begin "$@"; }; then
    lost_or_die "the run could not be started on $NAME: see above"
    return 1
  fi
  on 0 launch/tpu_worker.sh follow || true  # the connection may break; what counts is the status
  if [[ -n "$DRY_RUN" ]]; then return; fi
  status="$(first_status)"
  case "$status" in
    0) return ;;
    running | "$STOPPED") ;;
    *) lost_or_die "the run ended with status $status; $NAME is kept: --delete $NAME deletes it" ;;
  esac
  return 1
}

# The state of the queued resource: ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, …; ABSENT.
state() {
  gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" --format="value(state.state)" 2>/dev/null ||
    echo ABSENT
}

# Asks for the TPU unless it is there, and waits until it is.
acquire() {
  local now=ABSENT before=""
  while true; do
    if [[ -z "$DRY_RUN" ]]; then now="$(state)"; fi
    case "$now" in
      ACTIVE) return ;;
      ABSENT) create || return 2 ;;
      SUSPENDED) queued delete "$NAME" --force --quiet || return 2 ;;
      FAILED) die "$NAME was refused: gcloud compute tpus queued-resources describe $NAME --zone=$ZONE tells why" ;;
      *) [[ "$now" == "$before" ]] || say "waiting: $now" ;;
    esac
    if [[ -n "$DRY_RUN" ]]; then return; fi
    if [[ "$now" != ABSENT ]]; then sleep "${POLL:-30}"; fi
    before="$now"
  done
}

create() {
  local tier=()
  if [[ "${SPOT:-}" == 1 ]]; then tier=(--spot); fi
  queued create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="${IMAGE:-$(image)}" \
    "${tier[@]}"
}

# Google's table of TPU software versions for JAX.
image() {
  case "$TYPE" in
    v6e*) echo v2-alpha-tpuv6e ;;
    v5p*) echo v2-alpha-tpuv5 ;;
    v5litepod*) echo v2-alpha-tpuv5-lite ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

# Copies the code as it is now, makes all machines ready, and starts the command on them.
begin() {
  local packed status=0
  packed="$(mktemp --suffix=.tar.gz)"
  run pack_code "$packed" &&
    run gcloud compute tpus tpu-vm scp "$packed" "$NAME:nuner_jax.tar.gz" --zone="$ZONE" --worker=all &&
    run gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all \
      --command="mkdir -p nuner_jax && tar xzf nuner_jax.tar.gz -C nuner_jax" &&
    on all launch/tpu_worker.sh prepare "$BUCKET" &&
    on all launch/tpu_worker.sh start "$@" --distributed --workdir="/mnt/bucket/runs/$NAME" || status=$?
  rm "$packed"
  return "$status"
}

# The first machine's answer, running, none or an exit status; unknown, where it cannot be reached.
# (Only an answer lets a run be started: over one that goes on, it would end that.)
first_status() {
  local tries=5 answer  # a new machine takes a while to know our key
  if [[ -n "$DRY_RUN" ]]; then return; fi
  while ((tries--)); do
    answer="$(gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=0 \
      --command="if cd nuner_jax; then launch/tpu_worker.sh status; else echo status=none; fi" 2>/dev/null |
      sed -n 's/^status=//p')"
    if [[ -n "$answer" ]]; then break; fi
    if [[ "$(state)" != ACTIVE ]]; then break; fi
    sleep "${POLL:-30}"
  done
  echo "${answer:-unknown}"
}

# After a failure: returns if the TPU was taken away meanwhile; else the failure is the run's own.
lost_or_die() {
  local looks=3  # the state follows late
  while ((looks--)); do
    if [[ "$(state)" != ACTIVE ]]; then return; fi
    sleep "${POLL:-30}"
  done
  die "$1"
}

say() {
  echo "nuner_jax: $NAME: $*" >&2
}

main "$@"
