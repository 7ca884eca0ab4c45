#!/usr/bin/env bash
usage() {
  cat <<'TEXT'
One machine with NVIDIA GPUs: installs paxo into .venv for its driver, and runs an experiment on all
GPUs in one process. A run that crashed is started again and goes on from its last checkpoint.

  launch/gpu_node.sh [options] FILE [arguments of `paxo run`]

  --restarts N       how often it is started again (3)
  --pause SECONDS    before that (10)
  --dry-run          print every command, do nothing

  launch/gpu_node.sh experiments/dpo_hh.py --workdir /shared/dpo --set data.path=pairs.jsonl mesh.fsdp=-1

Ctrl-C stops it. A machine that was taken away is replaced by another and the same command, with
--workdir on a disk that both see or in a bucket. Exit codes: those of `paxo run`.
TEXT
}
set -euo pipefail

RESTARTS=3 PAUSE=10 DRY_RUN=0
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '%s\n' "$*" >&2; }

die() {
  say "gpu_node.sh: error: $1"
  exit 2
}

run() {
  if ((DRY_RUN)); then printf '%s\n' "${*@Q}"; else "$@"; fi
}

# The extra for the driver: CUDA 13 wants 580 or later, CUDA 12 wants 525.
cuda_extra() {
  local driver
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) || true
  driver=${driver%%.*}
  [[ $driver =~ ^[0-9]+$ ]] || die "no NVIDIA GPU answers (nvidia-smi): on a CPU, 'paxo run' alone will do"
  if ((driver >= 580)); then
    echo cuda13
  elif ((driver >= 525)); then
    echo cuda12
  else
    die "the NVIDIA driver $driver is older than 525, which CUDA 12 wants: update it"
  fi
}

install() {
  local extra
  if [[ -x .venv/bin/paxo ]]; then return; fi
  if ((DRY_RUN)); then extra=cuda13; else extra=$(cuda_extra); fi
  run python3 -m venv .venv
  run .venv/bin/pip install --quiet ".[$extra]"
}

main() {
  local try code
  while (($#)); do
    case $1 in
      -h | --help) usage && exit ;;
      --dry-run) DRY_RUN=1 ;;
      --restarts | --pause)
        [[ ${2:-} =~ ^[0-9]+$ ]] || die "$1 wants a whole number; got '${2:-}'"
        if [[ $1 == --pause ]]; then PAUSE=$2; else RESTARTS=$2; fi
        shift
        ;;
      -*) die "unknown argument '$1'; see --help" ;;
      *) break ;;
    esac
    shift
  done
  cd "$ROOT"
  [[ -f ${1:-} ]] || die "name the experiment, such as experiments/dpo_hh.py; got '${1:-}'"
  install
  # What JAX takes of the memory at the start; 0.75 is its default.
  export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}
  for ((try = 0; ; try++)); do
    code=0
    run .venv/bin/paxo run "$@" || code=$?
    case $code in
      0 | 2 | 3 | 130) exit "$code" ;; # done, wrong use, NaN, Ctrl-C: no restart mends these
    esac
    if ((try >= RESTARTS)); then exit "$code"; fi
    say "exit code $code: restart $((try + 1)) of $RESTARTS, from the last checkpoint"
    sleep "$PAUSE"
  done
}

main "$@"
