#!/usr/bin/env bash
# tpu/profile.sh [--worker N] [--port PORT] [--dry-run] LOGDIR
# Serves the profiles under LOGDIR (gs://… or a folder on the worker) with xprof on a worker, and opens an ssh tunnel:
# look at http://localhost:PORT. Ctrl-C ends both.

set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "$0")/lib.sh"

worker=0
port=8791
logdir=
while (($#)); do
  case $1 in
    --worker) need_value "$1" $# && worker=$2 && shift ;;
    --port) need_value "$1" $# && port=$2 && shift ;;
    -*) common_option "$1" ;;
    *) logdir=$1 ;;
  esac
  shift
done
[[ -n $logdir ]] || fail "profile.sh needs the folder of the profiles, such as gs://my-bucket/runs/first/profile"
load_settings
require_whole_numbers worker port
# A terminal (-tt), so that the server over there ends with the connection.
TPU_SSH_FLAGS=(${TPU_SSH_FLAGS[@]+"${TPU_SSH_FLAGS[@]}"} "--ssh-flag=-L$port:localhost:$port" --ssh-flag=-tt)
say "http://localhost:$port"
worker_script "$worker" profile "$port" "$logdir" || fail "the profiler's server ended" 1
