#!/usr/bin/env bash
# Plays gcloud for the tests. In the folder $STUB:
#   calls                 receives every call, words separated by NUL, calls by RS
#   states, node_states   what describe answers, a line a call; the last line stays
#   fail_<verb>           how many more calls of that verb fail, with the text of fail_text
#   workers/<i>           the home folders of the workers: ssh and scp really happen there
set -u
{ printf '%s\0' "$@"; printf '\036'; } >>"$STUB/calls"

words=()
for word in "$@"; do
  case $word in
    alpha) ;;
    --command=*) command=${word#--command=} ;;
    --worker=*) which=${word#--worker=} ;;
    -*) ;;
    *) words+=("$word") ;;
  esac
done
verb=${words[2]}-${words[3]}

next_line() {
  [ -s "$1" ] || { echo READY && return; }
  head -n 1 "$1"
  if [ "$(wc -l <"$1")" -gt 1 ]; then sed -i 1d "$1"; fi
}

describe() {
  local answer
  answer=$(next_line "$1")
  case $answer in
    MISSING) echo "ERROR: (gcloud) NOT_FOUND: Resource was not found" >&2 && exit 1 ;;
    BROKEN) echo "ERROR: (gcloud) UNAVAILABLE: try later" >&2 && exit 1 ;;
  esac
  echo "WARNING: something harmless" >&2
  echo "$answer"
}

chosen_workers() {
  if [ "$which" = all ]; then ls -d "$STUB"/workers/*; else echo "$STUB/workers/$which"; fi
}

on_each_worker() {
  local code=0 home
  for home in $(chosen_workers); do
    (cd "$home" && HOME=$home bash -c "$command") || code=$?
  done
  exit "$code"
}

copy_to_each_worker() {
  local home target=${words[${#words[@]} - 1]}
  for home in $(chosen_workers); do
    cp "${words[@]:4:${#words[@]}-5}" "$home/${target#*:}" || exit 1
  done
}

# A deleted TPU loses its processes and its disks.
lose_workers() {
  local home
  for home in "$STUB"/workers/*; do
    [ ! -f "$home/hybrid_jax_job/pid" ] || kill -KILL -- "-$(cat "$home/hybrid_jax_job/pid")" 2>/dev/null
    rm -rf "$home" && mkdir "$home"
  done
}

if [ -s "$STUB/fail_$verb" ] && [ "$(cat "$STUB/fail_$verb")" -gt 0 ]; then
  echo $(($(cat "$STUB/fail_$verb") - 1)) >"$STUB/fail_$verb"
  cat "$STUB/fail_text" >&2 2>/dev/null
  exit 1
fi
case $verb in
  queued-resources-describe) describe "$STUB/states" ;;
  tpu-vm-describe) describe "$STUB/node_states" ;;
  queued-resources-create) ;;
  queued-resources-delete) lose_workers ;;
  tpu-vm-ssh) on_each_worker ;;
  tpu-vm-scp) copy_to_each_worker ;;
  *) echo "the stub does not know $*" >&2 && exit 64 ;;
esac
