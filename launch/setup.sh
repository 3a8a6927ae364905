# shellcheck shell=bash
# Sourced by the launch scripts, which run from the repository root: makes the virtual environment
# once, and says at once on later runs that it is up to date. Sets VENV and VENV_PYTHON.

VENV="${NUNER_VENV:-.venv}"
VENV_PYTHON="$VENV/bin/python"

die() {
  echo "error: $*" >&2
  exit 2
}

# Prints the leading comment of a script: from its second line to the first that is no comment.
usage() {
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$1"
}

# The modules that can be run, as COMMAND names them, on one line.
commands() {
  grep -rl --include='*.py' '^if __name__ == "__main__":' nuner_jax |
    sed -e 's|^nuner_jax/||' -e 's|\.py$||' -e 's|/__main__$||' -e 's|/|.|g' | sort | paste -sd' ' -
}

# check_command SCRIPT COMMAND: dies if there is no such module.
check_command() {
  [[ -n "$2" ]] || die "no command: $1 --help tells how to use it. Commands: $(commands)"
  [[ " $(commands) " == *" $2 "* ]] || die "no command '$2'. Commands: $(commands)"
}

# set_up EXTRAS [PACKAGE...]: the project, editable, with these extras ("" for none); then the
# packages by themselves, without the dependencies that they declare.
set_up() {
  local extras="$1" wanted
  local stamp="$VENV/.nuner-installed-${extras:-base}" unfinished="$VENV/.nuner-unfinished"
  shift
  wanted="$(fingerprint "$@")"
  if [[ -n "$wanted" && ! -e "$unfinished" && "$wanted" == "$(cat "$stamp" 2>/dev/null)" ]]; then
    return
  fi
  mark_unfinished "$unfinished"
  make_venv
  echo "nuner_jax: installing into $VENV${extras:+ with extras $extras} (1 to 5 minutes, once)" >&2
  install --editable ".${extras:+[$extras]}"
  if (($#)); then install --no-deps "$@"; fi
  fingerprint "$@" >"$stamp"
  fingerprint >"$VENV/.nuner-installed-base"  # every set of extras contains the base
  rm "$unfinished"
}

# Leaves a file in the environment for as long as it changes: an interrupted run starts over next
# time. A folder with content that is no environment, or a broken one of someone else's, is left
# alone.
mark_unfinished() {
  if [[ -e "$VENV" && -n "$(ls -A "$VENV" 2>/dev/null || echo file)" ]] &&
    ! compgen -G "$VENV/.nuner-*" >/dev/null && ! has_pip; then
    die "$VENV is not a virtual environment that works: remove it, or set NUNER_VENV to another"
  fi
  { mkdir -p "$VENV" && touch "$1"; } || die "cannot write to $VENV: set NUNER_VENV to another folder"
}

has_pip() {
  "$VENV_PYTHON" -m pip --version >/dev/null 2>&1
}

# Makes the environment, or repairs one whose making was interrupted or whose Python went away.
make_venv() {
  local python
  if has_pip; then return; fi
  python="$(find_python)"
  echo "nuner_jax: creating $VENV with $("$python" --version) ($python)" >&2
  rm -f "$VENV"/bin/python*
  "$python" -m venv "$VENV" || die "cannot create the virtual environment $VENV: see above"
}

# Everything that an installation depends on, as one hash; nothing when the environment is broken.
fingerprint() {
  "$VENV_PYTHON" -I -S -c '
import hashlib, os, sys
content = b"".join(open(name, "rb").read() for name in ("setup.py", "launch/setup.sh"))
key = repr((sys.version, os.getcwd(), sys.argv[1:])).encode()
print(hashlib.sha256(content + key).hexdigest())' "$@" 2>/dev/null || true
}

# The first interpreter that can be used: the user's choice and no other, else the newest found.
# Each is run, not just looked up: a pyenv shim exists for versions that are not installed.
find_python() {
  local python candidates=(python3.13 python3.12 python3.11 python3)
  if [[ -n "${PYTHON:-}" ]]; then candidates=("$PYTHON"); fi
  for python in "${candidates[@]}"; do
    if "$python" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' \
      >/dev/null 2>&1; then
      command -v "$python"
      return
    fi
  done
  die "no Python 3.11 or later with its venv module among: ${candidates[*]}." \
    "Install one (on Debian and Ubuntu: python3 and python3-venv) or set PYTHON to its path."
}

# -qq: pip's errors only.
install() {
  "$VENV_PYTHON" -m pip install -qq --disable-pip-version-check "$@" ||
    die "pip could not install $* into $VENV: its messages are above; run the same command again"
}
