#!/usr/bin/env bash
# tpu/delete.sh [--dry-run]
# Deletes the TPU with its queued resource, and everything on its disks: this ends the bill. What stands under gs:// stays.

set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "$0")/lib.sh"

while (($#)); do
  common_option "$1"
  shift
done
load_settings
if [[ $(queued_resource_state) == MISSING ]]; then
  say "there is no $TPU_NAME in $TPU_ZONE"
  exit 0
fi
with_retries delete_tpu || fail "$TPU_NAME could not be deleted and may still cost money: $(delete_command)" 1
say "$TPU_NAME is deleted"
