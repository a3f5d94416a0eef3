#!/usr/bin/env bash
# Trains on the GPUs of a SLURM cluster, one process per GPU; run it where sbatch is.
#
#   launch/slurm.sh --nodes N --gpus G [OPTIONS] -- --config configs/... --workdir SHARED/DIR
#
#   --nodes N   how many
#   --gpus G    on each of them: all that the node has
#   --cpus C    cores for each process (4)
#   --time T    limit of one job; the run goes on in the next (the partition's)
#   --name NAME of the job (refseg)
#   --dry-run   print the command
#
# Account and partition are read from SBATCH_ACCOUNT and SBATCH_PARTITION, as by sbatch itself.
set -euo pipefail
source "$(dirname "$0")/common.sh"

nodes='' gpus='' cpus=4 time='' name=refseg
options='nodes gpus cpus time name'
parse "$@"
require_name
require nodes gpus
count nodes gpus cpus
require_training
# Such as 9, 9:30, 0:09:30 or 0-0:9.
[[ ! $time =~ ^((0+-)?0+:)?0*([0-9](:[0-9]+)?|10(:0+)?)$ ]] ||
  fail "--time $time is too short: five minutes before the limit the run is saved and queued again"

# jax.distributed gives process i of a node its GPU i, so all must see all (no --gpus-per-task).
# Five minutes before the limit only the batch script is signaled: see slurm_job.sh.
run sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node="$gpus" --gpus-per-node="$gpus" \
  --cpus-per-task="$cpus" ${time:+--time="$time"} --requeue --open-mode=append \
  --signal=B:USR1@300 "$repo/launch/slurm_job.sh" "$(interpreter)" -m refseg_jax.main "${training[@]}"
