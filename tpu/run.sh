#!/usr/bin/env bash
# tpu/run.sh [--sync checkout | none | GIT_REF] [--env NAME=VALUE]… [--dry-run] -- COMMAND [ARGUMENT…]
# Sends the source and starts the same command on every worker, in ~/hybrid_jax, in the background, with a log
# (tpu/logs.sh). The same command again resumes the run. The variables named in TPU_EXPORTS and those of --env are set.
#
#   tpu/run.sh -- python -m hybrid_jax.train --config configs/quickstart.yaml run_dir=gs://my-bucket/runs/first

set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "$0")/lib.sh"

# Also before ${!name}, which would evaluate a subscript.
require_variable_name() { [[ $1 =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || fail "'$1' is not a variable's name"; }

export_line() { printf 'export %s=%s\n' "$1" "$(quote "$2")"; }

# The script that every worker runs. It travels as a file of mode 600, so that no secret stands in a command line.
command_script() {
  local name pair
  for name in ${TPU_EXPORTS:-}; do
    require_variable_name "$name"
    [[ -n ${!name:-} ]] || continue
    if [[ -n $DRY_RUN ]]; then export_line "$name" '(hidden)'; else export_line "$name" "${!name}"; fi
  done
  for pair in ${PAIRS[@]+"${PAIRS[@]}"}; do
    [[ $pair == *=* ]] || fail "--env must be NAME=VALUE, got '$pair'"
    require_variable_name "${pair%%=*}"
    export_line "${pair%%=*}" "${pair#*=}"
  done
  printf 'exec %s\n' "$(quote_all "${COMMAND[@]}")"
}

sync=checkout
PAIRS=()
while (($#)); do
  case $1 in
    --sync) need_value "$1" $# && sync=$2 && shift ;;
    --env) need_value "$1" $# && PAIRS+=("$2") && shift ;;
    --) shift && break ;;
    *) common_option "$1" ;;
  esac
  shift
done
COMMAND=("$@")
((${#COMMAND[@]})) || fail "run.sh needs a command: tpu/run.sh -- python -m hybrid_jax.train --config FILE"
load_settings

script=$(command_script)
with_retries on_workers 0 true || fail "worker 0 of $TPU_NAME does not answer to ssh" 1
on_workers all "mkdir -p -m 700 $JOB_FOLDER && { [ ! -e $JOB_FOLDER/worker.sh ] || bash $JOB_FOLDER/worker.sh require-idle; }" ||
  fail "not every worker is there and idle; see the lines above" 1
send_job "$sync" "$script"
worker_script all start || fail "not every worker started; tpu/stop.sh ends those that did" 1
say "started; tpu/logs.sh --follow shows the log, tpu/status.sh the state"
