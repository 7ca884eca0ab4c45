#!/usr/bin/env bash
usage() {
  cat <<'TEXT'
One or more TPU slices from the queue, also spot: waits for them, runs the job on all workers, and
after a pre-emption asks again and goes on from the last checkpoint, until the job is done.

  launch/tpu_queued.sh --name NAME --zone ZONE --type TYPE [options] -- FILE --workdir gs://... [...]

  --spot                cheaper, and may be taken away
  --slices N            slices of this type, joined over the data-centre network (1)
  --restarts N          how often the slices may be lost before it gives up (50)
  --keep                leave the slices when the job is done
  --project, --version, --env, --create-flag, --connect-flag, --logs, --tries, --pause, --poll,
  --dry-run             as in launch/tpu_vm.sh; further flags go to `queued-resources create`,
                        such as --create-flag --valid-until-duration=6h

  launch/tpu_queued.sh --name dpo --zone us-east5-b --type v6e-64 --spot -- \
    experiments/dpo_hh.py --workdir gs://BUCKET/dpo --set data.path=pairs.jsonl

The machine that it runs on asks every minute, so leave it running (tmux). Run again, it takes the
request that is there and the job that runs. Ctrl-C deletes the slices.

Exit codes: that of the job; 2 wrong use; 4 no quota; 75 lost too often.
TEXT
}
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

QUEUE=(gcloud compute tpus queued-resources)
TAKE_OVER=1

queue_state() {
  state "${1:-ACTIVE}" "${QUEUE[@]}" describe "$NAME" "${WHERE[@]}" '--format=value(state.state)'
}

machines_state() {
  case $(queue_state) in
    ACTIVE) echo up ;;
    NONE | SUSPENDING | SUSPENDED | FAILED | DELETING) echo gone ;;
    *) echo unknown ;;
  esac
}

on_workers() {
  local flags=("${@:1:$#-1}")
  run "${QUEUE[@]}" ssh "$NAME" "${WHERE[@]}" --node=all --worker=all --quiet "${CONNECT_FLAGS[@]}" \
    "${flags[@]}" "--command=${*: -1}"
}

to_workers() {
  run "${QUEUE[@]}" scp "$1" "$NAME:" "${WHERE[@]}" --node=all --worker=all --quiet "${CONNECT_FLAGS[@]}"
}

create() {
  local flags=("--accelerator-type=$TYPE" "--runtime-version=$VERSION" "${CREATE_FLAGS[@]}")
  if ((SPOT)); then flags+=(--spot); fi
  if ((SLICES > 1)); then
    flags+=("--node-count=$SLICES" "--node-prefix=$NAME")
  else
    flags+=("--node-id=$NAME")
  fi
  made "${QUEUE[@]}" create "$NAME" "${WHERE[@]}" "${flags[@]}"
}

delete() {
  if [[ $(queue_state) == NONE ]]; then return; fi
  retry "deleting $NAME" run "${QUEUE[@]}" delete "$NAME" "${WHERE[@]}" --force --quiet
}

# Asks for the slices where nobody has, and waits until they are there; 1 where the request failed.
obtain() {
  local now last='' assumed=NONE
  while true; do
    now=$(queue_state "$assumed")
    if [[ $now != "$last" ]]; then say "$NAME: $now"; fi
    last=$now
    case $now in
      ACTIVE) return 0 ;;
      NONE)
        create
        assumed=ACTIVE TAKE_OVER=0
        ;;
      FAILED)
        query '' "${QUEUE[@]}" describe "$NAME" "${WHERE[@]}" '--format=value(state.failedData.error.message)' \
          >"$SCRATCH/failed" || true
        cat "$SCRATCH/failed" >&2
        if is_quota "$SCRATCH/failed"; then
          die "the project has no quota for $TYPE in $ZONE: ask for more (console, IAM & Admin, Quotas), or name another --zone or --type" $NO_QUOTA
        fi
        return 1
        ;;
      SUSPENDING | SUSPENDED | DELETING) return 1 ;;
    esac
    wait_for "$POLL"
  done
}

# Whether slices that were there at the start are at the job, which another call has started.
job_runs() {
  if ((!TAKE_OVER)); then return 1; fi
  TAKE_OVER=0
  on_workers 'bash paxo-launch/worker.sh status' >"$SCRATCH/report" 2>/dev/null || return 1
  grep -q 'paxo-job: running' "$SCRATCH/report" && ! grep -qE 'paxo-job: (exit|absent)' "$SCRATCH/report"
}

# One life of the slices: 0 when the job is done, its code when it failed, PREEMPTED when they went.
attempt() {
  obtain || return $PREEMPTED
  if job_runs; then
    say "the job runs already"
    STARTED=1
  else
    install || return $PREEMPTED
    start || return $PREEMPTED
  fi
  watch
}

until_done() {
  local lost code
  for ((lost = 0; ; lost++)); do
    code=0
    attempt || code=$?
    case $code in
      0 | "$WRONG_USE" | "$NON_FINITE") return "$code" ;;
    esac
    if ((lost >= RESTARTS)); then
      say "gave up after $lost restarts"
      return $PREEMPTED
    fi
    say "restart $((lost + 1)) of $RESTARTS: the job goes on from the last checkpoint in $(workdir)"
    # A job that crashed restarts where it is; slices that went are asked for again.
    if [[ $code == "$PREEMPTED" ]]; then
      delete || return 1
    fi
    wait_for "$PAUSE"
  done
}

clean_up() {
  local code=$1
  trap - EXIT
  trap '' INT TERM
  case $(queue_state) in
    NONE) say "$NAME is not there" ;;
    *)
      if ((STARTED)); then logs || true; fi
      if ((KEEP)); then
        say "$NAME is kept and costs until: ${QUEUE[*]} delete $NAME ${WHERE[*]} --force"
      elif delete; then
        say "$NAME is deleted"
      else
        say "$NAME IS NOT DELETED AND COSTS: ${QUEUE[*]} delete $NAME ${WHERE[*]} --force"
        code=$((code ? code : 1))
      fi
      ;;
  esac
  rm -rf "$SCRATCH"
  exit "$code"
}

main() {
  if [[ ${1:-} == -h || ${1:-} == --help ]]; then usage && exit; fi
  parse "$@"
  check_type
  check_job
  case $(workdir) in
    *://* | /*) ;;
    *) die "--workdir must be a bucket's address or a shared folder (gs://BUCKET/...): the disk of a slice is lost with it" ;;
  esac
  SCRATCH=$(mktemp -d)
  trap 'clean_up $?' EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  until_done
}

main "$@"
