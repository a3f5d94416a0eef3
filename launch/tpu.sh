#!/usr/bin/env bash
# Trains on a Cloud TPU VM pod, asked for as a queued resource.
#
#   launch/tpu.sh ACTION --name NAME --zone ZONE [OPTIONS] [-- --config ... --workdir gs://...]
#
#   keep     create, install and start; the same again after every preemption; once the run is
#            finished, delete. May be ended and started again at any time; what `stop` stopped it
#            would start again. Or step by step:
#   create   ask for the pod
#   state    what has become of the request: ACTIVE is ready
#   install  copy the code to every worker, and install it there
#   start    start training on every worker, or start it anew: it resumes
#   watch    follow the log of worker 0
#   stop     end training on every worker: the run is saved
#   delete   delete the pod and the request
#
#   --name NAME        of the pod and of the request
#   --zone ZONE        where, e.g. us-west4-a
#   --project PROJECT  of Google Cloud (gcloud's own setting)
#   --type TYPE        accelerator, e.g. v5litepod-16 (for keep, create)
#   --runtime VERSION  TPU software, e.g. v2-alpha-tpuv5-lite (for keep, create)
#   --spot             may be preempted
#   --restarts N       failures on one pod, or looks in a row without an answer, until keep gives
#                      up (10)
#   --every S          seconds between two looks of keep (60)
#   --env NAME=VALUE   in the environment of training, may be given again (for keep, start)
#   --dry-run          print the commands
set -euo pipefail
source "$(dirname "$0")/common.sh"

name='' zone='' project='' type='' runtime='' spot='' restarts=10 every=60
options='name zone project type runtime restarts every env'
switches=spot actions='keep create state install start watch stop delete'
parse "$@"
[[ $action ]] || fail "one of these is missing: $actions (see $0 --help)"
require_name
require zone
count restarts every
where=(--zone="$zone" ${project:+--project="$project"})

# The service that systemd runs on each worker. At a shutdown it gets SIGTERM and time to save.
service=refseg
archive=build/refseg_jax.tar.gz

# on WORKER COMMAND: runs a shell command on one worker or on `all`.
on() {
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command="$2"
}

create() {
  require type runtime
  run gcloud compute tpus queued-resources create "$name" "${where[@]}" --node-id="$name" \
    --accelerator-type="$type" --runtime-version="$runtime" ${spot:+--spot}
}

state() {
  run gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
    --format='value(state.state)'
}

install() {
  # The system's Python may be older than ours; uv brings one.
  run mkdir -p "$repo/build" &&
    run tar -czf "$repo/$archive" -C "$repo" --exclude=__pycache__ \
      pyproject.toml requirements.txt configs refseg_jax &&
    run gcloud compute tpus tpu-vm scp "$repo/$archive" "$name:" "${where[@]}" --worker=all &&
    on all "mkdir -p refseg_jax && tar -xzf ${archive##*/} -C refseg_jax && cd refseg_jax && \
python3 -m pip install --quiet --user uv && \
{ [ -x .venv/bin/python ] || python3 -m uv venv --quiet --python 3.11 .venv; } && \
python3 -m uv pip install --quiet --python .venv/bin/python --editable '.[tpu]'"
}

start() {
  require_bucket
  local value variables=()
  for value in PYTHONUNBUFFERED=1 ${environment[@]+"${environment[@]}"}; do
    variables+=("--setenv=$value")
  done
  # First what still runs, or is remembered as failed, is ended. KillMode: its input workers are
  # not signaled. After: at a shutdown the network outlasts it. LimitMEMLOCK: libtpu pins memory.
  # systemd reads `$$` as `$`.
  on all "{ sudo systemctl stop $service; sudo systemctl reset-failed $service; } 2>/dev/null; \
cd refseg_jax && sudo systemd-run --unit=$service --remain-after-exit --uid=\"\$(id -u)\" \
--working-directory=\"\$PWD\" $(quote "${variables[@]}") --property=KillMode=mixed \
--property=TimeoutStopSec=300 --property=After=network-online.target --property=LimitMEMLOCK=infinity -- \
\"\$PWD/.venv/bin/python\" -m refseg_jax.main $(quote "${training[@]//\$/\$\$}")"
}

# What training on worker 0 is: running, exited (finished), failed, or dead (never started); and
# with which status it ended: 143 is that of a run that was told to stop.
progress() { on 0 "systemctl show $service --property=SubState,ExecMainStatus"; }

watch() { on 0 "sudo journalctl --unit=$service --lines=100 --follow --output=cat"; }

stop() { on all "sudo systemctl stop $service"; }

delete() {
  run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

failures=0 silences=0 asked=''
failed() { tolerate $((++failures)) "$1"; }
unanswered() { tolerate $((++silences)) "$1"; }
tolerate() {
  (($1 <= restarts)) || fail "$2, and --restarts $restarts are used up. A pod that there is stays," \
    "and is paid for: $0 delete --name $name ${where[*]}"
  note "$2 ($1 of $restarts)"
}

preempted() {
  note "preempted"
  if delete; then failures=0; else failed "the pod could not be deleted"; fi
}

# One look, and what follows from it; true once the run is finished.
look() {
  local answer
  if ! answer=$(state 2>&1); then
    # Anything but a clear "there is none" may pass, such as a broken line.
    if [[ $answer == *NOT_FOUND* ]]; then
      silences=0
      if create; then
        asked=yes
      elif [[ $asked ]]; then # What was granted once may be so again.
        failed "the request for a pod was refused"
      else
        fail "the request for a pod was refused"
      fi
    else
      unanswered "${answer##*$'\n'}"
    fi
    return 1
  fi
  [[ $answer ]] || { unanswered "nothing is said of the request" && return 1; }
  asked=yes
  [[ ${answer##*[[:space:]]} == ACTIVE ]] || silences=0
  case ${answer##*[[:space:]]} in
    ACTIVE) ;;
    SUSPENDED) preempted && return 1 ;;
    FAILED)
      failed "the request failed"
      delete || true
      return 1
      ;;
    *) note "$answer" && return 1 ;;
  esac
  if ! answer=$(progress 2>&1); then
    if [[ $answer == *"terminal state"* ]]; then # The pod is gone; the request does not say so yet.
      preempted
    else
      unanswered "no answer of worker 0: ${answer//$'\n'/ }"
    fi
    return 1
  fi
  # Beside what gcloud has to say.
  [[ $answer =~ SubState=([a-z-]+) ]] || { unanswered "worker 0 does not say how it is" && return 1; }
  silences=0
  case ${BASH_REMATCH[1]} in
    exited) return 0 ;;
    dead) { install && start; } || failed "training could not be started" ;;
    failed)
      if [[ $answer == *ExecMainStatus=143* ]]; then
        note "training was told to stop"
        start || failed "training could not be started"
      else
        failed "training failed: launch/tpu.sh watch shows why"
        # A worker that is as new, which the cloud may have made of a broken one, has no code.
        start || { install && start; } || true
      fi
      ;;
    *) note "${BASH_REMATCH[1]}" ;;
  esac
  return 1
}

keep() {
  require type runtime
  require_bucket
  if [[ $dry_run ]]; then
    create
    note "until it prints ACTIVE:" && state
    install
    start
    note "until it prints SubState=exited:" && progress
    note "after a preemption (SUSPENDED), before all of the above again, and at the end:"
    note "$(delete)"
  else
    until look; do sleep "$every"; done
    note "the run is finished"
    until delete; do
      failed "the pod could not be deleted"
      sleep "$every"
    done
  fi
}

"$action"
