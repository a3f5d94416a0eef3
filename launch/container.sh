#!/usr/bin/env bash
# Builds the container image that trains, for GPUs or for TPUs, and sends it to its registry.
#
#   launch/container.sh --for cuda|tpu --tag IMAGE [--push] [--dry-run]
#
#   --for     what it runs on
#   --tag     its name, e.g. us-docker.pkg.dev/PROJECT/REPOSITORY/refseg:tpu
#   --push    send it to the registry that the name says
#   --dry-run print the commands
set -euo pipefail
source "$(dirname "$0")/common.sh"

for='' tag='' push=''
options='for tag' switches=push
parse "$@"
require for tag
[[ $for == cuda || $for == tpu ]] || fail "--for is '$for', not cuda or tpu"

run docker build --platform=linux/amd64 --file="$repo/launch/Dockerfile" --build-arg=EXTRA="$for" \
  --tag="$tag" "$repo"
if [[ $push ]]; then run docker push "$tag"; fi
