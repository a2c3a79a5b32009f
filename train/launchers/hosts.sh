#!/usr/bin/env bash
# Pretrains on machines with addresses, one process on each: hosts.sh HOST… -- ARGUMENTS of pretrain
# PYTHON (python), FOLDER to start in (the same as here), PORT of the first host (8476). The hosts let ssh in without a
# password and see the same files. When one process breaks, all are ended and started again.
set -uo pipefail

hosts=()
while (($#)) && [[ "$1" != -- ]]; do hosts+=("$1"); shift; done
shift || true
((${#hosts[@]} && $#)) || { sed -n '2s/^# //p' "$0" >&2; exit 2; }
folder="${FOLDER:-$PWD}" port="${PORT:-8476}"
arguments="$(printf ' %q' "$@")"

pids=()
stop() { kill -TERM "${pids[@]}" 2>/dev/null; }
told=
trap 'told=1; stop' INT TERM

while [[ -z "$told" ]]; do
  pids=()
  for i in "${!hosts[@]}"; do
    named="OPTJAX_COORDINATOR=${hosts[0]}:$port OPTJAX_NUM_PROCESSES=${#hosts[@]} OPTJAX_PROCESS_ID=$i"
    # -tt: the process ends with its ssh.
    ${SSH:-ssh -tt} "${hosts[i]}" \
      "cd $(printf %q "$folder") && $named exec ${PYTHON:-python} -m optjax.train.pretrain$arguments" </dev/null &
    pids+=($!)
  done
  # A signal while they were being started has not reached them all.
  [[ -z "$told" ]] || stop
  status=0
  while ((${#pids[@]})); do
    for i in "${!pids[@]}"; do
      kill -0 "${pids[i]}" 2>/dev/null && continue
      wait "${pids[i]}"; one=$?
      unset "pids[i]"
      if ((one)); then ((status)) || status=$one; stop; fi
    done
    sleep "${POLL:-1}" & wait $!
  done
  [[ -n "$told" ]] && exit 75
  case "$status" in
    0) exit 0 ;;
    2) exit 2 ;;
    *) echo "ended with status $status; starting again" >&2; sleep "${WAIT:-10}" & wait $! ;;
  esac
done
exit 75
