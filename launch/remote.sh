# shellcheck shell=bash
# Sourced after setup.sh by the launch scripts that start commands with other programs (ssh, srun,
# gcloud, kubectl): what they have in common.

# The exit status of a training run that was asked to stop, and has saved: the same command goes on.
# shellcheck disable=SC2034  # read by those who source this
readonly STOPPED=75

DRY_RUN=""  # set by --dry-run

ACTION=""  # the last of the script's own options that was given, without its dashes
WORDS=()   # what follows the options

# read_options SCRIPT "ACTION..." WORD...: reads --help, --dry-run and the script's own options.
read_options() {
  local script="$1" known=" $2 "
  shift 2
  while [[ "${1:-}" == -* ]]; do
    case "$1" in
      -h | --help)
        usage "$script"
        exit
        ;;
      --dry-run) DRY_RUN=1 ;;
      *)
        [[ "$1" == --* && "$known" == *" ${1#--} "* ]] || die "unknown option $1: $script --help tells how to use it"
        ACTION="${1#--}"
        ;;
    esac
    shift
  done
  # shellcheck disable=SC2034  # read by those who source this
  WORDS=("$@")
}

# run COMMAND [ARGUMENT...]: runs it; with --dry-run only prints it, as a shell reads it.
run() {
  if [[ -n "$DRY_RUN" ]]; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}

# The words of a command on one line, each in quotes where any shell needs them.
quoted() {
  local word line=""
  for word in "$@"; do
    [[ "$word" =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+=" $word"
  done
  printf '%s' "${line:1}"
}

# need PROGRAM WHERE: dies if it is not installed; a dry run runs nothing, and needs nothing.
need() {
  [[ -n "$DRY_RUN" ]] || command -v "$1" >/dev/null || die "$1 is missing here: $2"
}

# need_variables SCRIPT NAME...: dies, naming all of them that are not set.
need_variables() {
  local script="$1" name missing=()
  shift
  for name in "$@"; do
    if [[ -z "${!name:-}" ]]; then missing+=("$name"); fi
  done
  ((!${#missing[@]})) || die "not set: ${missing[*]}. $script --help tells what they are"
}

# A run's name becomes that of machines, jobs and folders.
check_name() {
  [[ "$1" =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    die "the name '$1' has to be of a-z, 0-9 and -, 40 at most, with a letter first and no - at the end"
}

# The runs of the cloud scripts are in the bucket, at runs/NAME.
refuse_workdir() {
  local flag
  for flag in "$@"; do
    if [[ "$flag" == --workdir* || "$flag" == -workdir* ]]; then
      die "$flag: the workdir is gs://$BUCKET/runs/NAME; choose NAME"
    fi
  done
}

# Checkpoints are made whole by renaming their folder, which is one operation only in a bucket with
# a hierarchical namespace; it has one from its creation or never.
check_bucket() {
  local answer
  BUCKET="${BUCKET#gs://}"
  if [[ -n "$DRY_RUN" ]]; then return; fi
  answer="$(gcloud storage buckets describe "gs://$BUCKET" --format="default(hierarchical_namespace)")" ||
    die "gs://$BUCKET cannot be read: see above"
  grep -qi "enabled: true" <<<"$answer" ||
    die "gs://$BUCKET has no hierarchical namespace: launch/README.md has the command that makes one that has"
}

check_code() {
  git rev-parse --git-dir >/dev/null 2>&1 || die "$PWD is no git checkout: what is copied is what git lists"
}

# pack_code FILE: the code as it lies here (what git tracks, and what is new and not ignored).
pack_code() {
  git ls-files -z --cached --others --exclude-standard --deduplicate |
    while IFS= read -r -d '' file; do
      if [[ -e "$file" ]]; then printf '%s\0' "$file"; fi
    done | tar --create --gzip --null --files-from=- --file="$1"
}
