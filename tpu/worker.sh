#!/usr/bin/env bash
# What happens on a worker of the TPU. The other scripts copy this file there and call it over ssh:
#   worker.sh setup [REQUIREMENT…] | devices | require-idle | start | state | log N [follow] | stop SECONDS [force]
#             | profile PORT LOGDIR

set -euo pipefail

JOB=$HOME/hybrid_jax_job # this file, source.tar.gz, command.sh, and of the run: pid, exit_code, stopped, log
SOURCE=$HOME/hybrid_jax  # the checkout; the run starts in it
export PATH="$SOURCE/.venv/bin:$HOME/.local/bin:$PATH"

# Replaces the files of the last archive by those of the new one, and leaves what a run wrote beside them.
unpack() {
  [[ -f $JOB/source.tar.gz ]] || return 0
  mkdir -p "$SOURCE"
  cd "$SOURCE"
  if [[ -f $JOB/unpacked ]]; then
    while IFS= read -r path; do
      if [[ -n $path && $path != */ ]]; then rm -f -- "$path"; fi
    done <"$JOB/unpacked"
  fi
  tar -xzf "$JOB/source.tar.gz"
  tar -tzf "$JOB/source.tar.gz" >"$JOB/unpacked"
  rm "$JOB/source.tar.gz"
}

setup() {
  unpack
  cd "$SOURCE"
  command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  [[ -x .venv/bin/python ]] || uv venv --python 3.12 .venv
  # gcsfs, which etils[epath-gcs] brings, opens gs:// paths.
  uv pip install --python .venv/bin/python -e '.[tpu]' 'etils[epath-gcs]' "$@"
}

devices() {
  require_idle
  cd "$SOURCE"
  python -c '
import jax
jax.distributed.initialize(initialization_timeout=180)
print(f"worker {jax.process_index()} of {jax.process_count()}: jax.device_count() = {jax.device_count()},"
      f" {jax.local_device_count()} of them here, {jax.devices()[0].device_kind}", flush=True)'
}

# The pid may belong to someone else by now, after a reboot; ours is known by its command line.
alive() {
  [[ -f $JOB/pid ]] && ps -ww -o args= -p "$(cat "$JOB/pid")" | grep -q 'worker.sh supervise'
}

require_idle() {
  if alive; then
    printf 'a run is going on %s already (process %s); stop it with tpu/stop.sh\n' "$(hostname)" "$(cat "$JOB/pid")" >&2
    exit 3
  fi
}

start() {
  require_idle
  unpack
  rm -f "$JOB/exit_code" "$JOB/stopped"
  # A session of its own: it outlives the ssh connection, and stop reaches all of its processes as one group.
  nohup setsid bash "$JOB/worker.sh" supervise >>"$JOB/log" 2>&1 </dev/null &
  printf '%s\n' "$!" >"$JOB/pid"
  printf '%s: started, log in %s\n' "$(hostname)" "$JOB/log"
}

supervise() {
  local code=0
  trap : TERM # so that the exit code is still written after the trainer has saved
  cd "$SOURCE"
  printf '=== %s starts on %s\n' "$(date -u +%FT%TZ)" "$(hostname)"
  bash "$JOB/command.sh" || code=$?
  printf '=== %s exit code %s\n' "$(date -u +%FT%TZ)" "$code"
  printf '%s\n' "$code" >"$JOB/exit_code"
}

# One line: running, exit N, stopped (by stop.sh), died (no exit code: killed, or the machine restarted), or idle.
state() {
  if alive; then
    echo 'state: running'
  elif [[ -f $JOB/stopped ]]; then
    echo 'state: stopped'
  elif [[ -f $JOB/exit_code ]]; then
    printf 'state: exit %s\n' "$(cat "$JOB/exit_code")"
  elif [[ -f $JOB/pid ]]; then
    echo 'state: died'
  else
    echo 'state: idle'
  fi
}

log() {
  if [[ ${2:-} == follow ]]; then
    exec tail -n "$1" -F "$JOB/log"
  fi
  tail -n "$1" "$JOB/log"
}

# SIGTERM lets the trainer save; with force, what is left after SECONDS is killed.
stop() {
  local tenths=$(($1 * 10))
  alive || return 0
  touch "$JOB/stopped"
  kill -TERM -- "-$(cat "$JOB/pid")" || return 0
  while alive && ((tenths > 0)); do
    sleep 0.1
    tenths=$((tenths - 1))
  done
  alive || return 0
  if [[ ${2:-} == force ]]; then
    kill -KILL -- "-$(cat "$JOB/pid")"
    return 0
  fi
  printf '%s: still running %s s after SIGTERM\n' "$(hostname)" "$1" >&2
  return 1
}

profile() {
  exec uvx --python 3.12 --from xprof xprof "--port=$1" "--logdir=$2"
}

case ${1:-} in
  setup | devices | start | supervise | state | log | stop | profile) "$@" ;;
  require-idle) require_idle ;;
  *) printf 'error: worker.sh does not know %s\n' "'${1:-}'" >&2 && exit 2 ;;
esac
