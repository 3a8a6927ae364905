#!/usr/bin/env bash
# Runs a nuner_jax command on this machine, with all of its set-up.
#
# usage: launch/local.sh COMMAND [FLAG...]
#
#   launch/local.sh train --config=configs/quickstart.py
#   launch/local.sh train --help
#
# COMMAND is a module of nuner_jax (train, data.build, ...); the flags go to it unchanged, and
# paths in them start at the repository root. The first run makes a virtual environment and
# installs the project into it; later runs start at once.
#
# environment:
#   NUNER_VENV     folder of the virtual environment (default: .venv)
#   NUNER_EXTRAS   extras to install, separated by commas: cuda13, cuda12 or tpu for an
#                  accelerator, annotate for annotation (default: none, which runs on the CPU)
#   PYTHON         interpreter that makes the environment (default: the newest from 3.11 to 3.13)
#   GLIBC_TUNABLES settings of the C library (default: large arrays in huge pages, where the kernel
#                  has them on request; a step on a CPU is then a fifth faster, for it takes its
#                  memory anew each time)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh

main() {
  local command="${1:-}"
  case "$command" in
    -h | --help)
      usage launch/local.sh
      printf '\ncommands: %s\n' "$(commands)"
      return
      ;;
  esac
  check_command launch/local.sh "$command"
  shift
  set_up "${NUNER_EXTRAS:-}"
  export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
  exec "$VENV_PYTHON" -m "nuner_jax.$command" "$@"
}

main "$@"
