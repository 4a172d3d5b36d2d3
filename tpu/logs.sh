#!/usr/bin/env bash
# tpu/logs.sh [--worker N | all] [--lines N] [--follow] [--dry-run]
# The log of the run, on worker 0 unless told otherwise. Ctrl-C ends --follow, never the run.

set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "$0")/lib.sh"

worker=0
lines=50
follow=()
while (($#)); do
  case $1 in
    --worker) need_value "$1" $# && worker=$2 && shift ;;
    --lines) need_value "$1" $# && lines=$2 && shift ;;
    --follow) follow=(follow) ;;
    *) common_option "$1" ;;
  esac
  shift
done
load_settings
[[ $worker =~ ^([0-9]+|all)$ ]] || fail "--worker must be a number or all, got '$worker'"
require_whole_numbers lines
worker_script "$worker" log "$lines" ${follow[@]+"${follow[@]}"} || fail "no log could be read; was a run started?" 1
