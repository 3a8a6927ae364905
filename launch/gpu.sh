#!/usr/bin/env bash
# Runs a nuner_jax command on the NVIDIA GPUs of this machine, or of several.
#
# usage: launch/gpu.sh [--dry-run] COMMAND [FLAG...]
#
#   launch/gpu.sh train --config=configs/nuner_base.py
#   HOSTS="node1 node2" launch/gpu.sh train --config=configs/nuner_base.py
#
# HOSTS are reached by ssh without a password. This folder is at the same path on all of them, and
# so is the run's workdir: storage that they share. They run for as long as this script does: when
# it is interrupted, terminated or killed, all of them save and stop.
#
# Without ssh, start the same command on every machine, with COORDINATOR, NUM_PROCESSES and
# PROCESS_ID.
#
#   --dry-run   print what would be run, and run nothing
#
# environment:
#   HOSTS          machines, separated by spaces; the first one is process 0 (default: this one)
#   COORDINATOR    host:port of process 0 (default with HOSTS: the first one's port 12355)
#   NUM_PROCESSES  number of machines
#   PROCESS_ID     number of this machine, from 0
#   NUNER_EXTRAS   cuda13, or cuda12 for an older driver (default: cuda13)
#   XLA_FLAGS      more flags, beside those of launch/xla_gpu.sh
#   NUNER_VENV, PYTHON   as in launch/local.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
source launch/remote.sh

readonly PORT=12355
readonly PASSED_ON=(NUNER_EXTRAS NUNER_VENV PYTHON XLA_FLAGS)
export NUNER_EXTRAS="${NUNER_EXTRAS:-cuda13}"

main() {
  read_options launch/gpu.sh attended "$@"  # --attended is how the script runs itself on HOSTS
  set -- "${WORDS[@]}"
  check_command launch/gpu.sh "${1:-}"
  if [[ "$ACTION" == attended ]]; then
    while_connected here "$@"
  elif [[ -n "${HOSTS:-}" ]]; then
    on_hosts "$@"
  else
    here "$@"
  fi
}

# On this machine, alone or as one of several.
here() {
  need nvidia-smi "without an NVIDIA driver, launch/local.sh runs on the CPU"
  if [[ -n "${COORDINATOR:-}${NUM_PROCESSES:-}${PROCESS_ID:-}" ]]; then
    need_variables launch/gpu.sh COORDINATOR NUM_PROCESSES PROCESS_ID
    set -- "$@" "--coordinator=$COORDINATOR" "--num_processes=$NUM_PROCESSES" "--process_id=$PROCESS_ID"
  fi
  source launch/xla_gpu.sh
  run export NUNER_EXTRAS="$NUNER_EXTRAS" XLA_FLAGS="$XLA_FLAGS" \
    XLA_PYTHON_CLIENT_MEM_FRACTION="$XLA_PYTHON_CLIENT_MEM_FRACTION"
  run exec launch/local.sh "$@"
}

# Installs on all machines, then runs the command on all of them, to the end of the last.
on_hosts() {
  local hosts host number
  read -ra hosts <<<"$HOSTS"
  need ssh "install it, or start the command on every machine with COORDINATOR, NUM_PROCESSES and PROCESS_ID"
  for host in "${hosts[@]}"; do  # one after the other, since they may share the environment's folder
    run ssh -o BatchMode=yes "$host" "$(there bash -euc "source launch/setup.sh && set_up $NUNER_EXTRAS")" ||
      die "$host: not reached by ssh, or without this folder ($PWD), or not installed: see above"
  done

  # The machines' standard input is this pipe. Nothing is ever written to it; that it closes, when
  # this script ends in whatever way, is the message.
  FOLDER="$(mktemp -d)"
  trap 'rm -r "$FOLDER"' EXIT
  mkfifo "$FOLDER/lifeline"
  exec {LIFELINE}<>"$FOLDER/lifeline"
  trap hang_up INT TERM HUP
  for number in "${!hosts[@]}"; do
    on_host "${hosts[number]}" "COORDINATOR=${COORDINATOR:-${hosts[0]#*@}:$PORT}" \
      "NUM_PROCESSES=${#hosts[@]}" "PROCESS_ID=$number" launch/gpu.sh --attended "$@" \
      <"$FOLDER/lifeline" {LIFELINE}>&- &
    if [[ -n "$DRY_RUN" ]]; then wait; fi  # printed in order
  done
  until wait; do :; done  # a signal interrupts it
  if [[ -e "$FOLDER/failed" ]]; then exit "$(cat "$FOLDER/failed/status")"; fi
}

# on_host HOST WORD...: runs the words there. The first that fails tells, and stops the others.
on_host() {
  local host="$1" status=0
  run ssh -o BatchMode=yes "$host" "$(there "${@:2}")" || status=$?
  if ((status)) && mkdir "$FOLDER/failed" 2>/dev/null; then
    echo "$status" >"$FOLDER/failed/status"
    if ((status != STOPPED)); then echo "$host: ended with status $status; the others stop" >&2; fi
    kill -TERM $$
  fi
}

# The words as a command for a shell on another machine, in this folder and with this environment.
there() {
  local name words=()
  for name in "${PASSED_ON[@]}"; do
    if [[ -n "${!name:-}" ]]; then words+=("$name=${!name}"); fi
  done
  echo "cd $(quoted "$PWD") && $(quoted env "${words[@]}" "$@")"
}

hang_up() {
  if [[ -n "$LIFELINE" ]]; then exec {LIFELINE}>&-; fi
  LIFELINE=""
}

# while_connected WORD...: runs the words, and terminates them when standard input closes.
while_connected() {
  local status=0 connection command watch
  exec {connection}<&0
  "$@" &
  command=$!
  {
    read -r -u "$connection" || true
    kill -TERM "$command"
  } >/dev/null 2>&1 &  # it must not hold the connection's output open
  watch=$!
  wait "$command" || status=$?
  kill "$watch" 2>/dev/null || true
  exit "$status"
}

main "$@"
