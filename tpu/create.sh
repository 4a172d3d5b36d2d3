#!/usr/bin/env bash
# tpu/create.sh [--spot | --on-demand | --flex-start] [--dry-run]
# Requests a TPU through a queued resource and waits until it is ACTIVE. One that exists already is waited for, one
# that failed or was preempted is deleted and requested again. Ctrl-C leaves the request in the queue.

set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "$0")/lib.sh"

runtime_version() {
  case $1 in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

capacity_flags() {
  case $1 in
    spot) FLAGS+=(--spot) ;;
    on-demand) ;;
    flex-start)
      TRACK=(alpha) # flex-start is in gcloud alpha only
      FLAGS+=(--provisioning-model=flex-start "--max-run-duration=${TPU_MAX_RUN:-24h}")
      ;;
    *) fail "TPU_CAPACITY must be spot, on-demand or flex-start, got '$1'" ;;
  esac
}

request() {
  local errors code=0
  errors=$(
    cloud ${TRACK[@]+"${TRACK[@]}"} compute tpus queued-resources create "$TPU_NAME" "--node-id=$TPU_NAME" \
      "${LOCATION[@]}" "${FLAGS[@]}" 2>&1 >/dev/null
  ) || code=$?
  [[ -z $errors ]] || say "$errors"
  case $code:$errors in
    0:* | *ALREADY_EXISTS*) return 0 ;;
    *INVALID_ARGUMENT* | *PERMISSION_DENIED* | *UNAUTHENTICATED* | *"unrecognized arguments"*)
      fail "Google refused the request itself; asking again would not help"
      ;;
  esac
  return 1
}

request_with_retries() {
  with_retries request || fail "the request was not accepted in $TPU_RETRIES attempts" 1
  say "requested $TPU_ACCELERATOR as $TPU_NAME in $TPU_ZONE. It costs money from ACTIVE on; this ends it:"
  say "  $(delete_command)"
}

delete_leftover() {
  say "$TPU_NAME is $1: deleting it before a new request"
  with_retries delete_tpu || fail "$TPU_NAME is $1 and could not be deleted" 1
}

request_unless_there() {
  local state
  with_retries read_state || fail "the state of $TPU_NAME could not be read in $TPU_RETRIES attempts" 1
  case $state in
    ACTIVE) [[ -z $DRY_RUN ]] || request_with_retries ;;
    MISSING) request_with_retries ;;
    FAILED | SUSPENDED | SUSPENDING | PREEMPTED | TERMINATED | STOPPED) delete_leftover "$state" && request_with_retries ;;
    *) say "$TPU_NAME is $state already" ;;
  esac
}

wait_until_active() {
  local state last=''
  while :; do
    with_retries read_state || fail "the state of $TPU_NAME could not be read in $TPU_RETRIES attempts" 1
    [[ $state == "$last" ]] || say "$(date +%T) $TPU_NAME: $state"
    last=$state
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING | PREEMPTED | TERMINATED | STOPPED | MISSING) fail "$TPU_NAME is $state: $(why)" 1 ;;
    esac
    sleep "$TPU_POLL_SECONDS"
  done
}

why() {
  cloud compute tpus queued-resources describe "$TPU_NAME" "${LOCATION[@]}" '--format=json(state)' 2>&1 | tr -s ' \n' ' '
}

capacity=
while (($#)); do
  case $1 in
    --spot | --on-demand | --flex-start) capacity=${1#--} ;;
    *) common_option "$1" ;;
  esac
  shift
done
load_settings
check_accelerator
TRACK=()
FLAGS=("--accelerator-type=$TPU_ACCELERATOR" "--runtime-version=${TPU_RUNTIME:-$(runtime_version "$TPU_ACCELERATOR")}")
capacity_flags "${capacity:-${TPU_CAPACITY:-spot}}"
[[ -z ${TPU_VALID_UNTIL:-} ]] || FLAGS+=("--valid-until-duration=$TPU_VALID_UNTIL")
FLAGS+=(${TPU_CREATE_FLAGS[@]+"${TPU_CREATE_FLAGS[@]}"})

request_unless_there
wait_until_active
say "$TPU_NAME is ACTIVE and costs money until: $(delete_command)"
