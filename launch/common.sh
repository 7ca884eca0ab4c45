# shellcheck shell=bash
# shellcheck disable=SC2034  # options are read by the scripts that source this file
# What tpu_vm.sh and tpu_queued.sh share: options, retries, the job on the workers.
#
# A script that sources this file defines, before it calls anything below "The job on the workers":
#   on_workers COMMAND...   runs a command on every worker; further gcloud flags may stand in front
#   to_workers FILE         copies a file to the home folder of every worker
#   machines_state          prints "up", "gone" (pre-empted or deleted) or "unknown"

# Codes of `paxo run` that no restart mends: wrong use, and a loss that became NaN.
WRONG_USE=2 NON_FINITE=3
NO_QUOTA=4 PREEMPTED=75

PROJECT='' ZONE='' NAME='' TYPE='' VERSION='' SPOT=0 SLICES=1
TRIES=5 PAUSE=20 POLL=60 RESTARTS=50 KEEP=0 DRY_RUN=0 LOGS=''
CREATE_FLAGS=() CONNECT_FLAGS=() ENVIRONMENT=() JOB=()
# Whether there is a job whose logs are worth fetching.
STARTED=0
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Printed commands go past the pipes and captures in which they stand.
exec 3>&1

say() {
  if ((!DRY_RUN)); then printf '%(%H:%M:%S)T %s\n' -1 "$*" >&2; fi
}

die() {
  printf '%s: error: %s\n' "${0##*/}" "$1" >&2
  exit "${2:-$WRONG_USE}"
}

# run COMMAND...: runs it; with --dry-run prints it, quoted for a shell, and succeeds.
run() {
  if ((DRY_RUN)); then
    printf '%s\n' "${*@Q}" >&3
  else
    "$@" 3>&-
  fi
}

# query ASSUMED COMMAND...: what it prints; with --dry-run prints the command and answers ASSUMED.
query() {
  local assumed=$1
  shift
  run "$@" || return
  if ((DRY_RUN)); then printf '%s\n' "$assumed"; fi
}

# state ASSUMED COMMAND...: what it prints; NONE where there is no such thing, and UNKNOWN where gcloud
# cannot tell: a cut network is no pre-emption.
state() {
  local errors=$SCRATCH/state-errors
  if query "$@" 2>"$errors"; then return; fi
  if grep -qiE 'not[ _]?found' "$errors"; then
    echo NONE
  else
    cat "$errors" >&2
    echo UNKNOWN
  fi
}

# wait_for SECONDS: sleeps in a way that a signal ends at once.
wait_for() {
  if ((DRY_RUN)); then return; fi
  sleep "$1" &
  wait $!
}

# retry WHAT COMMAND...: up to TRIES times, after PAUSE seconds and twice as long each time.
retry() {
  local what=$1 pause=$PAUSE try
  shift
  for ((try = 1; ; try++)); do
    if "$@"; then return 0; fi
    if ((try >= TRIES)); then
      say "$what failed $try times"
      return 1
    fi
    say "$what failed (try $try of $TRIES); again in $pause s"
    wait_for "$pause"
    pause=$((pause < 300 ? 2 * pause : 600))
  done
}

# parse ARGUMENT...: the options of both scripts; what follows `--` is the job.
parse() {
  while (($#)); do
    case $1 in
      --dry-run) DRY_RUN=1 ;;
      --spot) SPOT=1 ;;
      --keep) KEEP=1 ;;
      --) JOB=("${@:2}") && break ;;
      --name | --project | --zone | --type | --version | --slices | --tries | --pause | --poll | \
        --restarts | --logs | --env | --create-flag | --connect-flag)
        (($# > 1)) || die "$1 wants a value"
        option "$1" "$2"
        shift
        ;;
      *) die "unknown argument '$1'; see --help" ;;
    esac
    shift
  done
  check_options
}

option() {
  case $1 in
    --name) NAME=$2 ;;
    --project) PROJECT=$2 ;;
    --zone) ZONE=$2 ;;
    --type) TYPE=$2 ;;
    --version) VERSION=$2 ;;
    --logs) LOGS=$2 ;;
    --env)
      [[ $2 == [A-Za-z_]*=* ]] || die "--env wants NAME=VALUE; got '$2'"
      ENVIRONMENT+=("$2")
      ;;
    --create-flag) CREATE_FLAGS+=("$2") ;;
    --connect-flag) CONNECT_FLAGS+=("$2") ;;
    *)
      [[ $2 =~ ^[0-9]+$ ]] || die "$1 wants a whole number; got '$2'"
      local setting=${1#--}
      printf -v "${setting^^}" %s "$2"
      ;;
  esac
}

check_options() {
  [[ -n $NAME ]] || die "--name is missing: what the machines shall be called"
  [[ -n $ZONE ]] || die "--zone is missing, such as us-east5-b; 'gcloud compute tpus locations list' has them"
  ((TRIES >= 1)) || die "--tries must be at least 1"
  ((SLICES >= 1)) || die "--slices must be at least 1"
  LOGS=${LOGS:-$ROOT/runs/launch-$NAME}
  WHERE=("--zone=$ZONE")
  if [[ -n $PROJECT ]]; then WHERE+=("--project=$PROJECT"); fi
}

# Needed for a machine that is made: its type, and the image that goes with it.
check_type() {
  [[ -n $TYPE ]] || die "--type is missing, such as v6e-8; 'gcloud compute tpus accelerator-types list --zone=$ZONE' has them"
  if [[ -z $VERSION ]]; then
    case $TYPE in
      v5litepod-* | v5e-*) VERSION=v2-alpha-tpuv5-lite ;;
      v5p-*) VERSION=v2-alpha-tpuv5 ;;
      v6e-*) VERSION=v2-alpha-tpuv6e ;;
      v2-* | v3-* | v4-*) VERSION=tpu-ubuntu2204-base ;;
      *) die "no runtime version is known for --type $TYPE: name one with --version; 'gcloud compute tpus tpu-vm versions list --zone=$ZONE' has them" ;;
    esac
  fi
}

check_job() {
  local file=${JOB[0]:-}
  [[ -n $file ]] || die "name the experiment after --, such as -- experiments/dpo_hh.py --workdir gs://BUCKET/dpo"
  [[ -f $ROOT/$file ]] || die "$file: no such file in $ROOT; the experiment is named by its path in the checkout"
}

# The value of --workdir among the job's arguments.
workdir() {
  local i
  for ((i = 1; i < ${#JOB[@]}; i++)); do
    case ${JOB[i]} in
      --workdir) printf '%s\n' "${JOB[i + 1]:-}" && return ;;
      --workdir=*) printf '%s\n' "${JOB[i]#--workdir=}" && return ;;
    esac
  done
}

# Whether what gcloud wrote tells of a limit of the project, or of something that passes.
is_quota() { grep -qi 'quota' "$1"; }
is_transient() {
  grep -qiE 'no more capacity|out of capacity|RESOURCE_EXHAUSTED|UNAVAILABLE|INTERNAL|DEADLINE|timed? ?out' "$1"
}

# made COMMAND...: makes machines. Capacity is waited for; a quota, or wrong use, is told at once.
made() {
  local errors=$SCRATCH/errors pause=$PAUSE try
  for ((try = 1; ; try++)); do
    if run "$@" 2>"$errors"; then return 0; fi
    cat "$errors" >&2
    if is_quota "$errors"; then
      die "the project has no quota for $TYPE in $ZONE: ask for more (console, IAM & Admin, Quotas), or name another --zone or --type" $NO_QUOTA
    fi
    if ! is_transient "$errors"; then die "gcloud refused to make $NAME, see above"; fi
    if ((try >= TRIES)); then die "no capacity for $TYPE in $ZONE after $try tries; tpu_queued.sh waits for it" $PREEMPTED; fi
    say "no capacity for $TYPE in $ZONE (try $try of $TRIES); again in $pause s"
    wait_for "$pause"
    pause=$((pause < 300 ? 2 * pause : 600))
  done
}

# --- The job on the workers -------------------------------------------------------------------

# The working tree (tracked and new files, not what git ignores) and the job's command, packed.
pack() {
  local stage=$SCRATCH/paxo-launch pair file
  mkdir -p "$stage/paxo"
  git -C "$ROOT" ls-files -z --cached --others --exclude-standard >"$SCRATCH/files" 2>/dev/null ||
    die "$ROOT is not a checkout of git: clone the project and launch from there"
  while IFS= read -rd '' file; do # those that were deleted are listed too
    if [[ -e $ROOT/$file ]]; then printf '%s\0' "$file"; fi
  done <"$SCRATCH/files" | tar -C "$ROOT" --null -T - -cf - | tar -C "$stage/paxo" -xf -
  cp "$ROOT/launch/worker.sh" "$stage/worker.sh"
  {
    for pair in "${ENVIRONMENT[@]}"; do printf 'export %s=%q\n' "${pair%%=*}" "${pair#*=}"; done
    printf 'exec paxo run %s\n' "${JOB[*]@Q}"
  } >"$stage/job.sh"
  tar -C "$SCRATCH" -czf "$SCRATCH/paxo-launch.tar.gz" paxo-launch
}

UNPACK='tar -xzf paxo-launch.tar.gz && bash paxo-launch/worker.sh'

# Sends the job and installs paxo; a worker that has just booted may refuse ssh for a minute.
install() {
  if ((DRY_RUN)); then
    printf '# the working tree and the command below, packed as paxo-launch.tar.gz\n' >&3
    printf "# paxo run %s\n" "${JOB[*]@Q}" >&3
  else
    pack
  fi
  retry "copying to $NAME" to_workers "$SCRATCH/paxo-launch.tar.gz" &&
    retry "installing on $NAME" on_workers "$UNPACK install tpu"
}

start() {
  STARTED=1
  retry "starting on $NAME" on_workers 'bash paxo-launch/worker.sh start'
}

stop() { on_workers 'bash paxo-launch/worker.sh stop' || true; }

# Waits for the job: 0 when all workers are done, its exit code when one failed, PREEMPTED when the
# machines are gone.
watch() {
  local report=$SCRATCH/report silent=0 codes code
  while true; do
    if on_workers 'bash paxo-launch/worker.sh status' >"$report"; then
      silent=0
      if ((DRY_RUN)); then return 0; fi
      codes=$(sed -nE 's/.*paxo-job: exit ([0-9]+).*/\1/p' "$report" | sort -n)
      code=$(tail -n 1 <<<"$codes")
      if [[ ${code:-0} != 0 ]]; then
        # The others die of the loss of one: its code says more than theirs.
        code=$(grep -xE "$WRONG_USE|$NON_FINITE" <<<"$codes" | head -n 1 || true)
        code=${code:-$(tail -n 1 <<<"$codes")}
        say "the job failed with exit code $code"
        stop # the other workers would wait for the one that failed
        return "$code"
      fi
      if grep -q 'paxo-job: absent' "$report"; then
        say "a worker knows nothing of the job: it was made anew"
        return $PREEMPTED
      fi
      if [[ -n $code ]] && ! grep -q 'paxo-job: running' "$report"; then return 0; fi
    else
      case $(machines_state) in
        gone) say "$NAME was pre-empted" && return $PREEMPTED ;;
        *) silent=$((silent + 1)) ;;
      esac
      if ((silent >= TRIES)); then
        say "$NAME has not answered $silent times"
        return $PREEMPTED
      fi
      say "no answer from $NAME ($silent of $TRIES)"
    fi
    wait_for "$POLL"
  done
}

# Writes each worker's log to the folder LOGS.
logs() {
  run mkdir -p "$LOGS"
  retry "fetching logs of $NAME" on_workers "--output-directory=$LOGS" 'cat paxo-launch/job.log' &&
    say "logs are in $LOGS"
}
