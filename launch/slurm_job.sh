#!/usr/bin/env bash
# The job that launch/slurm.sh submits: runs a command on every GPU, and queues itself again when
# the time limit comes first. The command resumes what it did before.
#
#   launch/slurm_job.sh [--dry-run] COMMAND [ARGUMENTS]
set -euo pipefail

# SLURM runs a copy of this file, which has no neighbours: common.sh cannot be used here.
if [[ ${1:-} == --help ]]; then
  awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0"
  exit
fi
step=(srun --kill-on-bad-exit=1 --gpu-bind=none --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}")
if [[ ${1:-} == --dry-run ]]; then
  printf '%q ' "${step[@]}" "${@:2}"
  echo
  exit
fi
if ! (($#)) || [[ ! ${SLURM_JOB_ID:-} ]]; then
  echo "error: to be run by sbatch, with a command: see launch/slurm.sh --help" >&2
  exit 2
fi

# SLURM's controller does not always answer.
insist() {
  local try
  for try in 1 2 3 4 5; do
    if "$@"; then return 0; fi
    sleep "$try"
  done
}
ending='' told=''
# At the limit: every process saves and ends. (scancel with a signal leaves out this script.)
trap 'ending=yes; insist scancel --signal=TERM "$SLURM_JOB_ID"' USR1
# Preempted or canceled: SLURM has told the processes, and this script waits for them.
trap 'told=yes' TERM

"${step[@]}" "$@" &
# A signal ends `wait` before the step ends; the last one says how it ended.
while kill -0 $! 2>/dev/null; do wait $! || true; done
status=0
wait $! || status=$?

# Preempted with time to save (GraceTime), only the processes are told, and SLURM before 24.05 takes
# that for a failure.
if ((status == 143)) && [[ ! $ending$told ]] &&
  [[ $(insist scontrol show job "$SLURM_JOB_ID") =~ PreemptTime=[0-9] ]]; then
  ending=yes
fi
if [[ $ending ]] && ((status)); then
  insist scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
