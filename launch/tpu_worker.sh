#!/usr/bin/env bash
# What launch/tpu_vm.sh runs on each TPU VM, in the copy of this repository there.
#
# usage: launch/tpu_worker.sh prepare BUCKET
#        launch/tpu_worker.sh start COMMAND [FLAG...]
#        launch/tpu_worker.sh follow
#        launch/tpu_worker.sh status
#
#   prepare   mounts the bucket, and installs the project
#   start     starts the command in the background, where no connection is needed
#   follow    prints its output from the beginning, until it ends
#   status    prints status=running, its exit status (status=0), or status=none
#
# environment:
#   NUNER_MOUNT   where the bucket is mounted (default: /mnt/bucket)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh

readonly MOUNT="${NUNER_MOUNT:-/mnt/bucket}"
readonly STATE="$HOME/.nuner_jax"  # log, pid and exit status of the command that was started last

main() {
  case "${1:-}" in
    -h | --help) usage launch/tpu_worker.sh ;;
    prepare | start | follow | status) "$@" ;;
    *) die "no action '${1:-}': launch/tpu_worker.sh --help tells how to use it" ;;
  esac
}

prepare() {
  if ! mountpoint --quiet "$MOUNT"; then mount_bucket "$1"; fi
  PYTHON="${PYTHON:-$(recent_python)}"
  set_up tpu
}

mount_bucket() {
  command -v gcsfuse >/dev/null || install_gcsfuse
  sudo mkdir -p "$MOUNT"
  sudo chown "$(id -u)" "$MOUNT"
  # All machines write one checkpoint: what one of them has made, the others must see at once, and
  # what they have looked for in vain before, too.
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 "$1" "$MOUNT"
}

# As Google's documentation says.
install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc
  curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get update -qq
  sudo apt-get install -qq gcsfuse
}

# The newest Python there; the machines' image has had 3.10, which is too old: then uv fetches one.
recent_python() {
  (find_python) 2>/dev/null && return
  python3 -m pip install --quiet --user uv >&2
  ~/.local/bin/uv python install --quiet 3.12 >&2
  ~/.local/bin/uv python find 3.12
}

start() {
  mkdir -p "$STATE"
  # What is left of an earlier start, whose first machine has ended, would keep the TPU to itself.
  if alive; then kill -KILL -- "-$(cat "$STATE/pid")"; fi
  rm -f "$STATE/status"
  # A session of its own, so that it outlives the connection, and can be ended as a whole.
  # shellcheck disable=SC2016  # the inner shell expands it
  NUNER_EXTRAS=tpu setsid bash -c 'launch/local.sh "$@"; echo "$?" >"$0"' "$STATE/status" "$@" \
    >"$STATE/log" 2>&1 </dev/null &
  echo "$!" >"$STATE/pid"
}

follow() {
  if alive; then
    tail -n +1 -f --pid="$(cat "$STATE/pid")" "$STATE/log"
  else
    cat "$STATE/log"
  fi
}

status() {
  if alive; then
    echo "status=running"
  else
    echo "status=$(cat "$STATE/status" 2>/dev/null || echo none)"
  fi
}

alive() {
  [[ -e "$STATE/pid" && ! -e "$STATE/status" ]] && kill -0 "$(cat "$STATE/pid")" 2>/dev/null
}

main "$@"
