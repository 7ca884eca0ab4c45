#!/usr/bin/env bash
# The part that runs on a machine: installs paxo there, starts the job, says how it goes.
#
#   worker.sh install EXTRA   a Python of its own and paxo[EXTRA]; again, it changes nothing
#   worker.sh start           the job in the background; nothing where it runs already
#   worker.sh status          a line: "paxo-job: running", "paxo-job: exit CODE" or "paxo-job: absent"
#   worker.sh stop            ends the job, by force after half a minute
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

running() { [[ -f job.pid ]] && kill -0 -- "-$(<job.pid)" 2>/dev/null; }

case ${1:-} in
  install)
    # Images of TPU VMs bring Python 3.10; uv fetches a newer one.
    python3 -m pip install --quiet --user uv
    export PATH=$HOME/.local/bin:$PATH
    uv venv --quiet --allow-existing --python 3.12 venv
    uv pip install --quiet --python venv/bin/python "./paxo[${2:?which extra}]"
    ;;
  start)
    if running; then
      echo "paxo-job: runs already"
      exit 0
    fi
    rm -f job.exit
    # A session of its own: the job outlives the connection, and is ended as one group.
    setsid bash worker.sh job </dev/null >>job.log 2>&1 &
    echo $! >job.pid
    echo "paxo-job: started"
    ;;
  job)
    export PATH=$PWD/venv/bin:$PATH
    code=0
    (cd paxo && bash ../job.sh) || code=$?
    echo "$code" >job.exit.new
    mv job.exit.new job.exit
    ;;
  status)
    if [[ -f job.exit ]]; then
      echo "paxo-job: exit $(<job.exit)"
    elif running; then
      echo "paxo-job: running"
    elif [[ -f job.pid ]]; then
      echo "paxo-job: exit 137" # killed, with no time to say why
    else
      echo "paxo-job: absent"
    fi
    ;;
  stop)
    if running; then kill -TERM -- "-$(<job.pid)"; fi
    for ((tick = 0; tick < 150; tick++)); do
      if ! running; then exit 0; fi
      sleep 0.2
    done
    kill -KILL -- "-$(<job.pid)"
    ;;
  *)
    echo "usage: worker.sh install EXTRA | start | status | stop" >&2
    exit 2
    ;;
esac
