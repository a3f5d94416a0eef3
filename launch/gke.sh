#!/usr/bin/env bash
# Trains on Google Kubernetes Engine: one JobSet, one pod per host, restarted as a whole.
#
#   launch/gke.sh --name NAME --image IMAGE --accelerator TYPE (--topology T | --hosts H --gpus G)
#                 [OPTIONS] -- --config configs/... --workdir gs://...
#
#   --name NAME             of the JobSet
#   --image IMAGE           made by launch/container.sh
#   --accelerator TYPE      e.g. tpu-v5-lite-podslice, or nvidia-l4
#   --topology T            TPU: of the slice, e.g. 4x4
#   --chips C               TPU: per host (4)
#   --hosts H, --gpus G     GPU: how many hosts, and GPUs on each
#   --spot                  may be preempted
#   --restarts N            failures until it gives up (10); a preemption is none, unless a pod that
#                           ends with the one that is preempted is seen first
#   --service-account NAME  of Kubernetes, with access to the bucket (default)
#   --env NAME=VALUE        in the environment of training, may be given again
#   --dry-run               print the commands
set -euo pipefail
source "$(dirname "$0")/common.sh"

name='' image='' accelerator='' topology='' chips='' hosts='' gpus='' spot='' restarts=10
service_account=default
options='name image accelerator topology chips hosts gpus restarts service-account env'
switches=spot
parse "$@"
require_name
require image accelerator
count restarts
require_bucket

# A YAML string. `$` is doubled because Kubernetes expands $(NAME) in arguments.
text() {
  local quoted=${1//\'/\'\'}
  printf "'%s'" "${quoted//\$/\$\$}"
}

for word in "${training[@]}" ${environment[@]+"${environment[@]}"}; do
  [[ $word != *[[:cntrl:]]* ]] || fail "a line break or tab in $(quote "$word")"
done
arguments=()
for word in "${training[@]}"; do arguments+=("$(text "$word")"); done
variables=''
for word in ${environment[@]+"${environment[@]}"}; do
  variables+="
                    - name: ${word%%=*}
                      value: $(text "${word#*=}")"
done
variables=${variables:+"
                  env:$variables"}

if [[ $accelerator == tpu* ]]; then
  require topology
  chips=${chips:-4}
  count chips
  [[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] ||
    fail "--topology is '$topology', not like 4x4 or 2x2x4"
  [[ ! $hosts$gpus ]] || fail "--hosts and --gpus are for GPUs: --topology says it all"
  total=$((${topology//x/*}))
  ((total % chips == 0)) ||
    fail "--topology $topology has $total chips, not a multiple of --chips $chips"
  hosts=$((total / chips))
  device=google.com/tpu per_host=$chips
  # A slice is one node pool. JAX finds the other hosts by what GKE puts into the environment.
  annotations='
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool'
  selector="
                cloud.google.com/gke-tpu-accelerator: $(text "$accelerator")
                cloud.google.com/gke-tpu-topology: $topology"
  security='
                  securityContext:
                    privileged: true'
else
  [[ ! $topology$chips ]] ||
    fail "--hosts and --gpus are for GPUs such as $accelerator, --topology and --chips for TPUs"
  require hosts gpus
  count hosts gpus
  device=nvidia.com/gpu per_host=$gpus annotations='' security=''
  selector="
                cloud.google.com/gke-accelerator: $(text "$accelerator")"
  # JAX is told: pod 0 by the name that JobSet gives it, and the pod's own number.
  # shellcheck disable=SC2016  # Kubernetes expands it.
  arguments+=(--coordinator "$name-workers-0-0.$name:8476" --num_processes "'$hosts'"
    --process_id '$(JOB_COMPLETION_INDEX)')
fi
if [[ $spot ]]; then
  selector+="
                cloud.google.com/gke-spot: 'true'"
fi

jobset=$(
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name$annotations
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
      - name: preempted
        action: RestartJobSetAndIgnoreMaxRestarts
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: workers
      replicas: 1
      template:
        spec:
          completionMode: Indexed
          completions: $hosts
          parallelism: $hosts
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onPodConditions:
                  - type: DisruptionTarget
                    status: 'True'
              # What a run ends with that was told to stop, and is saved: in the other pods, too,
              # of which any may be seen to end first.
              - action: FailJob
                onExitCodes:
                  operator: In
                  values: [143]
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 120
              serviceAccountName: $(text "$service_account")
              nodeSelector:$selector
              containers:
                - name: train
                  image: $(text "$image")$security$variables
                  args:$(printf '\n                    - %s' "${arguments[@]}")
                  resources:
                    limits:
                      $device: $per_host
                  volumeMounts:
                    - name: memory
                      mountPath: /dev/shm
              volumes:
                - name: memory
                  emptyDir:
                    medium: Memory
YAML
)

# One of that name, which may run still: its pods save and end before the new ones begin.
run kubectl delete jobset "$name" --ignore-not-found --cascade=foreground
if [[ $dry_run ]]; then
  printf "kubectl create --filename - <<'YAML'\n%s\nYAML\n" "$jobset"
else
  kubectl create --filename - <<<"$jobset"
fi
