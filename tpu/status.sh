#!/usr/bin/env bash
# tpu/status.sh [--dry-run]
# The state of the queued resource and the TPU, and of the run on every worker.

set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "$0")/lib.sh"

while (($#)); do
  common_option "$1"
  shift
done
load_settings
state=$(tpu_state)
[[ -n $DRY_RUN ]] || printf '%s: %s\n' "$TPU_NAME" "$state"
[[ $state == ACTIVE ]] || exit 0
on_workers all "$STATE_COMMAND" || fail "not every worker of $TPU_NAME answers to ssh" 1
