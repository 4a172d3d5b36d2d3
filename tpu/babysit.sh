#!/usr/bin/env bash
# tpu/babysit.sh [--delete-when-done] [--sync …] [--env NAME=VALUE]… [--dry-run] -- COMMAND [ARGUMENT…]
# Creates the TPU, sets it up and runs the command as run.sh does, until it has finished: a preempted TPU is deleted,
# requested and set up again, a run that crashed is started again. The same command resumes. Options after
# --delete-when-done are run.sh's. If a run is going on already, it is watched.
#
# Ends with 0 when the command ended with 0 on every worker, 2 when it ended with 2 (a mistake in the config),
# 143 after tpu/stop.sh, 1 after TPU_MAX_RESTARTS restarts without TPU_HEALTHY_SECONDS of running between them, or
# when somebody deleted the TPU.

set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "$0")/lib.sh"

launch() {
  "$TPU_FOLDER/create.sh" ${DRY_RUN:+--dry-run} || return
  case $(run_state) in
    running)
      say "a run is going on: watching it"
      up_since=$SECONDS
      return
      ;;
    failed) "$TPU_FOLDER/stop.sh" --force || return ;;
  esac
  # The source is sent here and not again by run.sh, so that what was installed is what runs.
  "$TPU_FOLDER/setup.sh" ${DRY_RUN:+--dry-run} --sync "$sync" || return
  start
}

start() {
  "$TPU_FOLDER/run.sh" ${DRY_RUN:+--dry-run} --sync none ${ENVIRONMENT[@]+"${ENVIRONMENT[@]}"} -- "${COMMAND[@]}" || return
  up_since=$SECONDS
}

# persist FUNCTION [ARGUMENT…]: until it succeeds, within the bound on restarts. A mistake of the user ends it at once.
persist() {
  local code
  while :; do
    code=0
    "$@" || code=$?
    ((code != 0)) || return 0
    ((code != 2)) || exit 2
    wait_for_restart "could not start the run"
  done
}

# wait_for_restart WHY: counts, and waits twice as long each time, an hour at most. A run that was up for
# TPU_HEALTHY_SECONDS was no failure of ours: counting begins anew.
wait_for_restart() {
  local delay doublings
  if [[ -n $up_since ]] && ((SECONDS - up_since >= TPU_HEALTHY_SECONDS)); then restarts=0; fi
  up_since=
  restarts=$((restarts + 1))
  if ((restarts > TPU_MAX_RESTARTS)); then
    fail "$1; gave up after $TPU_MAX_RESTARTS restarts. What is left costs money until: $(delete_command)" 1
  fi
  doublings=$((restarts < 12 ? restarts - 1 : 11))
  delay=$((TPU_BACKOFF_SECONDS << doublings))
  ((delay <= 3600)) || delay=3600
  say "$(date +%T) $1; restart $restarts of $TPU_MAX_RESTARTS in ${delay}s"
  sleep "$delay"
}

# require_bucket: what a run leaves on a worker's disk is lost with it, so training must write into a bucket. The setting
# stands in the command, else in the config that the command names.
require_bucket() {
  local word before='' file='' folder=''
  [[ " ${COMMAND[*]} " == *" hybrid_jax.train "* ]] || return 0
  for word in "${COMMAND[@]}"; do
    case $word in
      run_dir=*) folder=${word#run_dir=} ;;
      --config=*) file=${word#--config=} ;;
      *) [[ $before != --config ]] || file=$word ;;
    esac
    before=$word
  done
  if [[ -z $folder && -f $REPOSITORY/$file ]]; then
    folder=$(sed -n 's/^run_dir: *\([^ #]*\).*/\1/p' "$REPOSITORY/$file")
  fi
  [[ -z $folder || $folder == gs://* ]] ||
    fail "run_dir is '$folder', on a disk that is lost with a preempted TPU; add run_dir=gs://MY_BUCKET/runs/NAME to the command"
}

# run_state: one word for all workers together: running, finished, config_error, stopped, failed, idle or unreachable.
run_state() {
  local lines
  if ! lines=$(on_workers all "$STATE_COMMAND" 2>/dev/null | grep '^state: ' | sort -u) || [[ -z $lines ]]; then
    echo unreachable
    return
  fi
  case $lines. in
    *'exit 2'[!0-9]*) echo config_error ;;
    *died* | *'exit '[!0]*) echo failed ;;
    *running*) echo running ;;
    *stopped*) echo stopped ;;
    'state: exit 0.') echo finished ;;
    'state: idle.') echo idle ;;
    *) echo failed ;;
  esac
}

# The workers that are left hang in a collective without their peer: they too must go before the restart.
restart_run() {
  "$TPU_FOLDER/stop.sh" --force || return
  start
}

finish() {
  say "$(date +%T) the run has finished"
  if [[ -n $delete_when_done ]]; then
    "$TPU_FOLDER/delete.sh"
  else
    say "$TPU_NAME costs money until: $(delete_command)"
  fi
  exit 0
}

watch_run() {
  case $(run_state) in
    running) unreachable=0 ;;
    finished) finish ;;
    config_error) fail "the command ended with 2, a mistake in its config: tpu/logs.sh shows it. The TPU is still there" ;;
    stopped) fail "the run was stopped by tpu/stop.sh; the TPU is still there" 143 ;;
    unreachable)
      unreachable=$((unreachable + 1))
      ((unreachable < TPU_RETRIES)) || { unreachable=0 && wait_for_restart "a worker does not answer" && persist launch; }
      ;;
    *) wait_for_restart "the run ended too early" && persist restart_run ;;
  esac
}

watch_tpu() {
  local state
  state=$(tpu_state)
  case $state in
    ACTIVE) watch_run ;;
    UNKNOWN) ;; # the question failed; asked again
    MISSING | DELETING) fail "$TPU_NAME was deleted by somebody: not requesting another one" 1 ;;
    *) wait_for_restart "$TPU_NAME is $state" && persist launch ;;
  esac
}

delete_when_done=
sync=checkout
ENVIRONMENT=()
while (($#)); do
  case $1 in
    --delete-when-done) delete_when_done=1 ;;
    --sync) need_value "$1" $# && sync=$2 && shift ;;
    --env) need_value "$1" $# && ENVIRONMENT+=(--env "$2") && shift ;;
    --) shift && break ;;
    *) common_option "$1" ;;
  esac
  shift
done
COMMAND=("$@")
((${#COMMAND[@]})) || fail "babysit.sh needs a command: tpu/babysit.sh -- python -m hybrid_jax.train --config FILE"
load_settings
check_accelerator
require_bucket
up_since=
restarts=0
unreachable=0

if [[ -n $DRY_RUN ]]; then
  launch
  say "then asks for the state every ${TPU_POLL_SECONDS}s, and after a preemption deletes the TPU and does the same again"
  tpu_state >/dev/null
  run_state >/dev/null
  exit 0
fi
persist launch
while :; do
  sleep "$TPU_POLL_SECONDS"
  watch_tpu
done
