# shellcheck shell=bash
# What all launch scripts share: reading arguments, one-line errors, dry runs. To be sourced.
#
# A script sets a variable for each option (`node_count` is --node-count), lists the options that
# take a value in `options` and those that take none in `switches`, and calls `parse "$@"`. The
# words after `--` become `training`; a word of `actions`, where a script has any, becomes `action`;
# each NAME=VALUE of an option `env`, one of `environment`.

dry_run='' action='' training=() environment=()
# shellcheck disable=SC2034  # For the scripts.
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# One line on stderr, and exit status 2.
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

note() { printf '# %s\n' "$*"; }

# The comment at the head of the script is its manual.
help() { awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0"; }

parse() {
  while (($#)); do
    case $1 in
      --help) help && exit ;;
      --dry-run) dry_run=yes ;;
      --) shift && training=("$@") && break ;;
      --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" && continue ;;
      --*)
        local option=${1#--}
        if [[ " ${switches:-} " == *" $option "* ]]; then
          printf -v "${option//-/_}" yes
        elif [[ " ${options:-} " == *" $option "* ]]; then
          [[ ${2:-} && ${2:-} != --* ]] || fail "$1 needs a value"
          if [[ $option == env ]]; then
            [[ $2 =~ ^[a-zA-Z_][a-zA-Z0-9_]*= ]] || fail "--env is '$2', not NAME=VALUE"
            environment+=("$2")
          else
            printf -v "${option//-/_}" %s "$2"
          fi
          shift
        else
          fail "unknown option $1 (see $0 --help)"
        fi
        ;;
      *)
        [[ " ${actions:-} " == *" $1 "* && ! $action ]] || fail "unexpected argument '$1'"
        action=$1
        ;;
    esac
    shift
  done
}

# require OPTION...: each was given.
require() {
  local option
  for option; do
    local variable=${option//-/_}
    [[ ${!variable} ]] || fail "--$option is missing (see $0 --help)"
  done
}

# count OPTION...: each is a whole number from 1 up.
count() {
  local option
  for option; do
    local variable=${option//-/_}
    [[ ${!variable} =~ ^[1-9][0-9]*$ ]] || fail "--$option is '${!variable}', not a number from 1 up"
  done
}

# A name that Google Cloud and Kubernetes accept for what the scripts create.
require_name() {
  require name
  # shellcheck disable=SC2154  # Of the scripts.
  [[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    fail "--name is '$name': lower-case letters, digits and hyphens, 40 at most"
}

require_training() {
  ((${#training[@]})) || fail "the arguments of training are missing: -- --config configs/NAME.py"
}

# Machines that come and go keep nothing: their run directory must be in a bucket.
require_bucket() {
  require_training
  local i workdir=''
  for ((i = 0; i < ${#training[@]}; i++)); do # The last one counts.
    case ${training[i]} in
      --workdir) workdir=${training[i + 1]:-} ;;
      --workdir=*) workdir=${training[i]#*=} ;;
    esac
  done
  [[ $workdir == gs://?* ]] ||
    fail "training needs a run directory that outlives the machines: --workdir gs://BUCKET/RUN"
}

# The words, quoted so that a shell, here or on another machine, reads them back unchanged.
quote() {
  local word words=() quoted="'\\''" # A variable: before 4.3 bash keeps a replacement's own quoting.
  for word; do
    [[ $word =~ ^[-+_./:=@%,a-zA-Z0-9]+$ ]] || word="'${word//\'/$quoted}'"
    words+=("$word")
  done
  printf '%s' "${words[*]}"
}

# Runs a command, or prints it.
run() {
  if [[ $dry_run ]]; then printf '%s\n' "$(quote "$@")"; else "$@"; fi
}

# The interpreter of this machine: $PYTHON, the virtual environment of the README, or any.
interpreter() {
  local candidate=$repo/.venv/bin/python
  [[ -x $candidate ]] || candidate=python3
  printf '%s' "${PYTHON:-$candidate}"
}
