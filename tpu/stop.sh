#!/usr/bin/env bash
# tpu/stop.sh [--force] [--dry-run]
# Ends the run on every worker by SIGTERM, so that it saves first, and waits TPU_STOP_SECONDS for it. --force kills what
# is left then. The TPU stays, and costs; tpu/delete.sh ends that. tpu/run.sh with the same command resumes.

set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "$0")/lib.sh"

force=()
while (($#)); do
  case $1 in
    --force) force=(force) ;;
    *) common_option "$1" ;;
  esac
  shift
done
load_settings
worker_script all stop "$TPU_STOP_SECONDS" ${force[@]+"${force[@]}"} ||
  fail "the run did not end everywhere within ${TPU_STOP_SECONDS}s; --force kills it" 1
say "no run is left on $TPU_NAME; it still costs money until tpu/delete.sh"
