#!/usr/bin/env bash
# Runs `python -m dlc_jax.main ARGS...` as N processes on this machine, over loopback.
#
#   launch/local.sh 2 --config=configs/demo.py --workdir=runs/demo
#
# What process 0 prints goes to the terminal; what the others print goes to stderr, with their rank.
# SIGTERM and SIGINT let all of them save and stop; a second one kills them. Where one fails, the
# others notice and stop; those that do not are told to, and then killed. Exit code: 2 if any process
# had it, else that of the first that failed.
#
# DLC_JAX_PYTHON  the Python to use; .venv/bin/python of this clone, or else python3
# DLC_JAX_CORES   cores for each process, e.g. 1: process 0 gets core 0, process 1 core 1, ...
# DLC_JAX_GPUS    GPUs for each process, e.g. 1: process 0 sees GPU 0, process 1 GPU 1, ...
# DLC_JAX_GRACE   seconds that the others have to notice, and to stop when they are told to; 60
set -uo pipefail

usage() {
  echo "error: $1" >&2
  echo "usage: launch/local.sh N ARGS..." >&2
  exit 2
}

number() { [[ $1 =~ ^[1-9][0-9]{0,3}$ ]]; }

num=${1:-}
number "$num" || usage "N must be a number of processes, not '$num'"
shift
cores=${DLC_JAX_CORES:-} gpus=${DLC_JAX_GPUS:-} grace=${DLC_JAX_GRACE:-60}
[[ -z $cores ]] || number "$cores" || usage "DLC_JAX_CORES must be a number, not '$cores'"
[[ -z $gpus ]] || number "$gpus" || usage "DLC_JAX_GPUS must be a number, not '$gpus'"
number "$grace" || usage "DLC_JAX_GRACE must be a number of seconds, not '$grace'"

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${DLC_JAX_PYTHON:-$root/.venv/bin/python}
[[ -n ${DLC_JAX_PYTHON:-} || -x $python ]] || python=python3
command -v "$python" >/dev/null || usage "no Python at '$python'; set DLC_JAX_PYTHON"
if [[ -n $cores ]]; then
  # the cores that this shell may use need not start at 0
  allowed=$("$python" -c 'import os; print(*sorted(os.sched_getaffinity(0)))') || exit 1
  read -ra allowed <<<"$allowed"
  ((num * cores <= ${#allowed[@]})) ||
    usage "$num processes of $cores cores need more than the ${#allowed[@]} cores there are"
fi
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])') ||
  exit 1
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$num

pids=() codes=() pipes=()
told=0    # how often the processes were told to stop
failed=   # code of the first that failed
deadline= # when the others are told to stop, and then killed

send() {
  local rank
  for rank in "${!pids[@]}"; do
    [[ -n ${codes[rank]} ]] || kill -s "$1" "${pids[rank]}" 2>/dev/null
  done
}

# shellcheck disable=SC2329  # called by the trap
stop() {
  told=$((told + 1))
  if ((told == 1)); then send TERM; else send KILL; fi
}
trap stop TERM INT

range() { # of N things for each process, those of process $1: "2,3"
  seq -s, $(($1 * $2)) $(($1 * $2 + $2 - 1))
}

start() {
  local rank=$1 prefix=()
  shift
  export JAX_PROCESS_ID=$rank
  if [[ -n $cores ]]; then
    local mine=("${allowed[@]:rank*cores:cores}")
    prefix=(taskset --cpu-list "$(IFS=, && echo "${mine[*]}")")
  fi
  if [[ -n $gpus ]]; then
    CUDA_VISIBLE_DEVICES=$(range "$rank" "$gpus")
    export CUDA_VISIBLE_DEVICES
  fi
  if ((rank == 0)); then
    "${prefix[@]}" "$python" -m dlc_jax.main "$@" &
  else
    # Ctrl-C reaches all processes of a terminal, and sed has to outlive the one it reads from
    exec {pipe}> >(trap '' INT TERM && exec sed -u "s/^/[$rank] /" >&2)
    pipes+=($!)
    "${prefix[@]}" "$python" -m dlc_jax.main "$@" >&"$pipe" 2>&1 {pipe}>&- &
  fi
  pids[rank]=$! codes[rank]=
  ((rank == 0)) || exec {pipe}>&-
}

for ((rank = 0; rank < num; rank++)); do start "$rank" "$@"; done

# bash would report processes that were killed in its own words
exec {stderr}>&2 2>/dev/null

# `wait -n` would miss a process that ended between two calls in older versions of bash
left=$num
while ((left > 0)); do
  sleep 0.2
  for ((rank = 0; rank < num; rank++)); do
    [[ -z ${codes[rank]} ]] || continue
    ! kill -0 "${pids[rank]}" || continue
    wait "${pids[rank]}"
    code=$?
    ((code != 143)) || code=75 # SIGTERM came before Python was ready for it
    codes[rank]=$code left=$((left - 1))
    if ((code != 0)) && [[ -z $failed ]]; then
      failed=$code deadline=$((SECONDS + grace))
      ((left == 0 || told > 0)) ||
        echo "process $rank ended with code $code; the others will stop" >&"$stderr"
    fi
  done
  if [[ -n $failed ]] && ((SECONDS >= deadline)); then
    stop
    deadline=$((SECONDS + grace))
  fi
done
exec 2>&"$stderr"

for pipe in "${pipes[@]}"; do wait "$pipe"; done
for code in "${codes[@]}"; do ((code != 2)) || failed=2; done
((num == 1 || ${failed:-0} == 0)) || echo "exit codes of the processes: ${codes[*]}" >&2
exit "${failed:-0}"
