# shellcheck shell=bash
# What the scripts of this folder share. Sourced, never run. Works with bash 3.2 (macOS) and later.

TPU_FOLDER=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
REPOSITORY=$(dirname "$TPU_FOLDER")
JOB_FOLDER=hybrid_jax_job # on every worker, in the home folder: worker.sh and the files of the run
DRY_RUN=
exec 3>&1 # what --dry-run prints goes here, also from inside $(…)

say() { printf '%s\n' "${DRY_RUN:+# }$*" >&2; }

# fail MESSAGE [EXIT_CODE]: one line; 2, the default, is the user's mistake, 1 the cloud's.
fail() {
  printf 'error: %s\n' "$1" >&2
  exit "${2:-2}"
}

# The comment at the head of the script that runs.
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

# common_option OPTION: takes --dry-run and --help, refuses anything else.
common_option() {
  case $1 in
    --dry-run) DRY_RUN=1 ;;
    -h | --help) usage && exit 0 ;;
    *) fail "unknown argument '$1'; see $(basename "$0") --help" ;;
  esac
}

# need_value OPTION COUNT: an option must be followed by its value; COUNT is how many words are left, itself included.
need_value() { (($2 >= 2)) || fail "$1 needs a value; see $(basename "$0") --help"; }

load_settings() {
  local file=${TPU_ENV:-$TPU_FOLDER/env}
  if [[ -f $file ]]; then
    # shellcheck source=/dev/null
    source "$file"
  elif [[ -n ${TPU_ENV:-} ]]; then
    fail "TPU_ENV names no file: $file"
  fi
  require TPU_PROJECT TPU_ZONE TPU_NAME
  [[ $TPU_NAME =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
    fail "TPU_NAME must be lower-case letters, digits and dashes, got '$TPU_NAME'"
  : "${TPU_POLL_SECONDS:=30}" "${TPU_RETRIES:=5}" "${TPU_RETRY_SECONDS:=15}" "${TPU_STOP_SECONDS:=300}"
  : "${TPU_MAX_RESTARTS:=10}" "${TPU_BACKOFF_SECONDS:=60}" "${TPU_HEALTHY_SECONDS:=1800}"
  require_whole_numbers TPU_RETRIES TPU_RETRY_SECONDS TPU_STOP_SECONDS TPU_MAX_RESTARTS TPU_BACKOFF_SECONDS \
    TPU_HEALTHY_SECONDS
  [[ -n $DRY_RUN ]] || command -v gcloud >/dev/null ||
    fail "gcloud is not installed; see https://cloud.google.com/sdk/docs/install"
  make_scratch
  LOCATION=("--zone=$TPU_ZONE" "--project=$TPU_PROJECT" --quiet)
}

require() {
  local name
  for name in "$@"; do
    [[ -n ${!name:-} ]] || fail "$name is not set; cp tpu/env.example tpu/env and fill it in"
  done
}

require_whole_numbers() {
  local name
  for name in "$@"; do
    [[ ${!name} =~ ^[0-9]+$ ]] || fail "$name must be a whole number, got '${!name}'"
  done
}

# check_accelerator: TPU_ACCELERATOR by Google's name, one that exists; v5e-16 is accepted for v5litepod-16. The number
# counts chips of v5e and v6e, and cores, two a chip and four chips a host, of v4 and v5p.
check_accelerator() {
  require TPU_ACCELERATOR
  local kind=${TPU_ACCELERATOR%-*} count=${TPU_ACCELERATOR##*-}
  case $kind in
    tpu7x*) fail "tpu7x is rented through GKE only; see tpu/README.md" ;;
    v5e | v5litepod) kind=v5litepod ;;
    v4 | v5p | v6e) ;;
    *)
      fail "TPU_ACCELERATOR must be like v5litepod-16, v5p-128, v6e-8 or v4-8, got '$TPU_ACCELERATOR'"
      ;;
  esac
  if [[ $kind == v5litepod || $kind == v6e ]]; then
    [[ $count =~ ^(1|4|8|16|32|64|128|256)$ ]] ||
      fail "TPU_ACCELERATOR: $kind has 1, 4, 8, 16, 32, 64, 128 or 256 chips, got '$TPU_ACCELERATOR'"
  elif ! [[ $count =~ ^[1-9][0-9]*$ ]] || ((count % 8)); then
    fail "TPU_ACCELERATOR: $kind is counted in cores, 8 or a multiple of it, got '$TPU_ACCELERATOR'"
  fi
  TPU_ACCELERATOR=$kind-$count
}

# quote WORD: the word as any shell reads it back.
quote() {
  case $1 in
    '' | *[!A-Za-z0-9_@%+=:,./-]*) ;;
    *) printf '%s' "$1" && return ;;
  esac
  local rest=$1 quoted=
  while [[ $rest == *\'* ]]; do
    quoted=$quoted${rest%%\'*}\'\\\'\'
    rest=${rest#*\'}
  done
  printf "'%s'" "$quoted$rest"
}

# quote_all WORD…: the words as one line of shell.
quote_all() {
  local word separator=
  for word in "$@"; do
    printf '%s' "$separator" && quote "$word"
    separator=' '
  done
}

# cloud WORD…: runs gcloud, or prints the line under --dry-run. The one place that calls it.
cloud() {
  if [[ -n $DRY_RUN ]]; then
    printf '%s\n' "$(quote_all gcloud "$@")" >&3
  else
    gcloud "$@" </dev/null 3>&-
  fi
}

# with_retries COMMAND…: up to TPU_RETRIES times, waiting twice as long each time.
with_retries() {
  local attempt delay=$TPU_RETRY_SECONDS
  for ((attempt = 1; ; attempt++)); do
    "$@" && return 0
    ((attempt < TPU_RETRIES)) || return 1
    say "attempt $attempt of $TPU_RETRIES failed; again in ${delay}s"
    sleep "$delay"
    delay=$((delay * 2))
  done
}

# on_workers WHICH COMMAND: the command in the home folder of worker WHICH (a number, or all). Any failure is 1, so that
# a remote exit code is never taken for one of ours.
on_workers() {
  cloud compute tpus tpu-vm ssh "$TPU_NAME" "--worker=$1" "--command=$2" "${LOCATION[@]}" \
    ${TPU_SSH_FLAGS[@]+"${TPU_SSH_FLAGS[@]}"} || return 1
}

# worker_script WHICH WORD…: worker.sh on these workers.
worker_script() {
  local which=$1
  shift
  on_workers "$which" "bash $JOB_FOLDER/worker.sh $(quote_all "$@")"
}

# copy_to_workers FILE…: into the job folder of every worker.
copy_to_workers() {
  cloud compute tpus tpu-vm scp "$@" "$TPU_NAME:$JOB_FOLDER/" --worker=all "${LOCATION[@]}" \
    ${TPU_SSH_FLAGS[@]+"${TPU_SSH_FLAGS[@]}"} || return 1
}

# The state of the run on a worker, also where worker.sh never came.
# shellcheck disable=SC2034  # for the scripts that source this file
STATE_COMMAND="if [ -e $JOB_FOLDER/worker.sh ]; then bash $JOB_FOLDER/worker.sh state; else echo 'state: idle'; fi"

# make_scratch: a folder that goes with the script, in SCRATCH; under --dry-run only a name.
make_scratch() {
  SCRATCH=${TMPDIR:-/tmp}/hybrid_jax
  ERRORS=/dev/null
  [[ -z $DRY_RUN ]] || return 0
  SCRATCH=$(mktemp -d "$SCRATCH.XXXXXX")
  ERRORS=$SCRATCH/errors
  trap 'rm -rf "$SCRATCH"' EXIT
}

# pack_source WHAT FILE: the checkout as it lies there (all that git does not ignore), or a git ref, as a tar.gz.
pack_source() {
  [[ -z $DRY_RUN ]] || return 0
  if [[ $1 != checkout ]]; then
    git -C "$REPOSITORY" rev-parse --quiet --verify "$1^{commit}" >/dev/null ||
      fail "--sync must be checkout, none or a git ref, got '$1'"
    git -C "$REPOSITORY" archive --format=tar.gz --output="$2" "$1"
    return
  fi
  local path
  (
    cd "$REPOSITORY" || exit
    git ls-files -z --cached --others --exclude-standard |
      while IFS= read -r -d '' path; do
        if [[ -e $path || -L $path ]]; then printf '%s\0' "$path"; fi # deleted files are still in git's index
      done |
      COPYFILE_DISABLE=1 tar --null -T - -czf "$2"
  )
}

# send_job SYNC [COMMAND_SCRIPT]: worker.sh, the source unless SYNC is none, and what the run shall be.
send_job() {
  local files=("$TPU_FOLDER/worker.sh")
  if [[ $1 != none ]]; then
    pack_source "$1" "$SCRATCH/source.tar.gz"
    files+=("$SCRATCH/source.tar.gz")
  fi
  if (($# > 1)); then
    files+=("$SCRATCH/command.sh")
    if [[ -n $DRY_RUN ]]; then
      printf '# command.sh:\n#   %s\n' "${2//$'\n'/$'\n#   '}" >&3
    else
      (umask 077 && printf '%s\n' "$2" >"$SCRATCH/command.sh")
    fi
  fi
  with_retries copy_to_workers "${files[@]}" || fail "the files could not be copied to every worker" 1
}

# queued_resource_state: the word that Google gives (WAITING_FOR_RESOURCES, ACTIVE, …), MISSING, or UNKNOWN when the
# question failed. Under --dry-run it is ACTIVE.
queued_resource_state() { _state "queued-resources describe" 'value(state.state)'; }
node_state() { _state "tpu-vm describe" 'value(state)'; }

_state() {
  local state errors
  # shellcheck disable=SC2086  # two words
  if state=$(cloud compute tpus $1 "$TPU_NAME" "${LOCATION[@]}" "--format=$2" 2>"$ERRORS"); then
    [[ -n $DRY_RUN ]] && state=ACTIVE
    printf '%s\n' "${state:-UNKNOWN}"
    return
  fi
  errors=$(cat "$ERRORS")
  case $errors in
    *NOT_FOUND* | *"was not found"*) echo MISSING ;;
    *) say "$errors" && echo UNKNOWN ;;
  esac
}

# tpu_state: the queued resource's state; where that is ACTIVE, the node's own if it says otherwise (PREEMPTED, …),
# because a preempted node is seen there first.
tpu_state() {
  local state node
  state=$(queued_resource_state)
  if [[ $state == ACTIVE ]]; then
    node=$(node_state)
    [[ $node == READY ]] || state=$node
  fi
  printf '%s\n' "$state"
}

# read_state: tpu_state into the variable state; false while the question fails. For with_retries.
read_state() {
  state=$(tpu_state)
  [[ $state != UNKNOWN ]]
}

delete_command() { quote_all gcloud compute tpus queued-resources delete "$TPU_NAME" "${LOCATION[@]}" --force; }

# The node goes with its queued resource (--force), and with it the bill.
delete_tpu() {
  cloud compute tpus queued-resources delete "$TPU_NAME" "${LOCATION[@]}" --force || return 1
}
