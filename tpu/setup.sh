#!/usr/bin/env bash
# tpu/setup.sh [--sync checkout | none | GIT_REF] [--dry-run]
# On every worker: the source, uv, Python 3.12, pip install '.[tpu]' (and TPU_PACKAGES); then jax.device_count() as
# each worker sees it. Run it again after a change of the requirements; run.sh itself carries changes of the code.

set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "$0")/lib.sh"

sync=checkout
while (($#)); do
  case $1 in
    --sync) need_value "$1" $# && sync=$2 && shift ;;
    *) common_option "$1" ;;
  esac
  shift
done
load_settings

# One worker first: the new ssh key reaches the project once, instead of every worker racing to add it.
with_retries on_workers 0 true || fail "worker 0 of $TPU_NAME does not answer to ssh" 1
with_retries on_workers all "mkdir -p -m 700 $JOB_FOLDER" || fail "not every worker of $TPU_NAME answers to ssh" 1
send_job "$sync"
with_retries worker_script all setup ${TPU_PACKAGES[@]+"${TPU_PACKAGES[@]}"} || fail "the installation failed" 1
worker_script all devices || fail "the workers did not find each other or their chips" 1
