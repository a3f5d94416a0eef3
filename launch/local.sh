#!/usr/bin/env bash
# Trains with several processes on this machine's CPU, as a pod does with several hosts.
#
#   launch/local.sh --processes N [OPTIONS] -- --config configs/alignformer.py [...]
#
#   --processes N   how many
#   --port PORT     where the processes find each other, on localhost (8476)
#   --grace S       seconds until the rest is killed, once one has failed (30)
#   --program FILE  run this instead of the front door, with the same arguments
#   --dry-run       print the commands
#
# SIGTERM (SIGHUP, too, is passed on as that) and SIGINT go on to every process, so that the run is
# saved; the same command resumes it. If a process fails the others are ended, and its exit status
# is returned.
set -euo pipefail
source "$(dirname "$0")/common.sh"

processes='' port=8476 grace=30 program=''
options='processes port grace program'
parse "$@"
require processes
count processes port grace
require_training

command=(env JAX_PLATFORMS=cpu JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo)
if [[ $program ]]; then command+=("$program"); else command+=("$(interpreter)" -m refseg_jax.main); fi
command+=("${training[@]}" --coordinator "localhost:$port" --num_processes "$processes")

if [[ $dry_run ]]; then
  for ((id = 0; id < processes; id++)); do
    printf '%s &\n' "$(quote "${command[@]}" --process_id "$id")"
  done
  echo wait
  exit
fi

# Two runs would share the port, and each other's processes.
if (: <>"/dev/tcp/localhost/$port") 2>/dev/null; then
  fail "port $port is in use: give another --port"
fi

pids=() stopped='' status=0 deadline=''

send() {
  local pid
  for pid in ${pids[@]+"${pids[@]}"}; do kill -s "$1" "$pid" 2>/dev/null || true; done
}
trap 'stopped=yes; send TERM' TERM HUP
trap 'stopped=yes; send INT' INT

set -m # Each process leads its own group: Ctrl-C reaches it through the trap alone, once.
for ((id = 0; id < processes; id++)); do
  [[ ! $stopped ]] || break
  "${command[@]}" --process_id "$id" </dev/null &
  pids+=($!)
done
set +m

running=("${!pids[@]}")
while ((${#running[@]})); do
  left=()
  for id in "${running[@]}"; do
    if kill -0 "${pids[id]}" 2>/dev/null; then
      left+=("$id")
      continue
    fi
    code=0
    wait "${pids[id]}" || code=$?
    if ((code && !status)); then
      status=$code deadline=$((SECONDS + grace))
      # Those who were told to stop are saving: a second signal would cut that short.
      if [[ ! $stopped ]]; then
        echo "process $id ended with status $code: the others are ended" >&2
        send TERM
      fi
    fi
  done
  running=(${left[@]+"${left[@]}"}) # An empty list is unset to a bash of before 4.4.
  # A process that waits for a lost one cannot be asked: its group is killed, workers included.
  if [[ $deadline ]] && ((SECONDS >= deadline)); then
    for id in ${running[@]+"${running[@]}"}; do kill -s KILL -- "-${pids[id]}" 2>/dev/null || true; done
  fi
  sleep 0.2 || true # Ctrl-C ends it as well.
done
exit "$status"
