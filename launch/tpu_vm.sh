#!/usr/bin/env bash
usage() {
  cat <<'TEXT'
One TPU slice, made on demand: create, install, run on all workers, fetch logs, delete.

  launch/tpu_vm.sh VERB --name NAME --zone ZONE [options] [-- FILE [arguments of `paxo run`]]

  create    make the VM; one that is there and ready is taken as it is
  install   send the working tree to all workers and install paxo
  run       start the job on all workers and wait for it; a job that runs already is waited for
  logs      fetch each worker's log
  delete    delete the VM; it costs until then
  all       all of these; the VM is deleted when any of them fails, and at Ctrl-C

  --type TYPE           v5litepod-16, v5p-8, v6e-8, ...
  --project PROJECT     default: the one that gcloud is set to
  --version VERSION     runtime version; default: the one for TYPE
  --spot                cheaper, and may be taken away: then the exit code is 75
  --keep                `all` leaves the VM; `launch/tpu_vm.sh delete` ends it
  --env NAME=VALUE      an environment variable of the job; may be repeated
  --create-flag FLAG    a further flag of `gcloud compute tpus tpu-vm create`; may be repeated
  --connect-flag FLAG   a further flag of `... ssh` and `... scp`, such as --internal-ip
  --logs DIR            default: runs/launch-NAME
  --tries N             how often a step is tried (5)
  --pause SECONDS       before the second try; it doubles (20)
  --poll SECONDS        between looks at the job (60)
  --dry-run             print every command, do nothing

  launch/tpu_vm.sh all --name dpo --zone us-east5-b --type v6e-8 -- \
    experiments/dpo_hh.py --workdir gs://BUCKET/dpo --set data.path=pairs.jsonl

Exit codes: that of the job; 2 wrong use; 4 no quota; 75 pre-empted, or no capacity: the same command
goes on from the last checkpoint in --workdir.
TEXT
}
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

TPU=(gcloud compute tpus tpu-vm)

vm_state() {
  state "${1:-READY}" "${TPU[@]}" describe "$NAME" "${WHERE[@]}" '--format=value(state)'
}

machines_state() {
  case $(vm_state) in
    READY) echo up ;;
    NONE | PREEMPTED | TERMINATED | STOPPED | STOPPING | DELETING) echo gone ;;
    *) echo unknown ;;
  esac
}

on_workers() {
  local flags=("${@:1:$#-1}")
  run "${TPU[@]}" ssh "$NAME" "${WHERE[@]}" --worker=all --quiet "${CONNECT_FLAGS[@]}" "${flags[@]}" \
    "--command=${*: -1}"
}

to_workers() {
  run "${TPU[@]}" scp "$1" "$NAME:" "${WHERE[@]}" --worker=all --quiet "${CONNECT_FLAGS[@]}"
}

create() {
  local flags=("--accelerator-type=$TYPE" "--version=$VERSION" "${CREATE_FLAGS[@]}")
  if ((SPOT)); then flags+=(--spot); fi
  case $(vm_state NONE) in
    READY) say "$NAME is there" && return ;;
    PREEMPTED | TERMINATED) delete ;;
  esac
  made "${TPU[@]}" create "$NAME" "${WHERE[@]}" "${flags[@]}"
}

delete() {
  if [[ $(vm_state) == NONE ]]; then return; fi
  retry "deleting $NAME" run "${TPU[@]}" delete "$NAME" "${WHERE[@]}" --quiet
}

# At the end of `all`, whatever ended it.
clean_up() {
  local code=$1
  trap - EXIT
  trap '' INT TERM
  if [[ $(vm_state) == NONE ]]; then
    say "$NAME is not there"
  else
    if ((STARTED)); then logs || true; fi
    if ((KEEP)); then
      say "$NAME is kept and costs until: $0 delete --name $NAME ${WHERE[*]/=/ }"
    elif delete; then
      say "$NAME is deleted"
    else
      say "$NAME IS NOT DELETED AND COSTS: $0 delete --name $NAME ${WHERE[*]/=/ }"
      code=$((code ? code : 1))
    fi
  fi
  rm -rf "$SCRATCH"
  exit "$code"
}

run_job() {
  start || return $PREEMPTED
  watch
}

main() {
  local verb=${1:-}
  case $verb in
    create | install | run | logs | delete | all) ;;
    -h | --help) usage && exit ;;
    *) die "name a verb: create, install, run, logs, delete or all; see --help" ;;
  esac
  parse "${@:2}"
  if [[ $verb == create || $verb == all ]]; then check_type; fi
  if [[ $verb == install || $verb == all ]]; then check_job; fi
  SCRATCH=$(mktemp -d)
  if [[ $verb != all ]]; then
    trap 'rm -rf "$SCRATCH"' EXIT
    if [[ $verb == run ]]; then verb=run_job; fi
    "$verb"
    return
  fi
  if [[ -z $(workdir) ]]; then say "no --workdir: checkpoints stay on the VM and go with it"; fi
  trap 'clean_up $?' EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  create
  install || exit $PREEMPTED
  run_job
}

main "$@"
