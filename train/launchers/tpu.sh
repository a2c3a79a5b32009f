#!/usr/bin/env bash
# Pretrains on Cloud TPU slices, and asks for them again when they are taken away. See README.md here.
#   tpu.sh --name NAME --zone ZONE --type ACCELERATOR [--slices N] [--spot] [--version RUNTIME] -- ARGUMENTS of pretrain
#   tpu.sh --name NAME --zone ZONE --delete
set -euo pipefail

name= zone= type= slices=1 spot= version= delete=
usage() { sed -n '2,4s/^# //p' "$0" >&2; exit 2; }
while (($#)); do
  case "$1" in
    --name) name="$2"; shift ;;
    --zone) zone="$2"; shift ;;
    --type) type="$2"; shift ;;
    --slices) slices="$2"; shift ;;
    --version) version="$2"; shift ;;
    --spot) spot=1 ;;
    --delete) delete=1 ;;
    --) shift; break ;;
    *) echo "tpu.sh: what is $1?" >&2; usage ;;
  esac
  shift
done
[[ -n "$name" && -n "$zone" ]] || usage

tpus=(gcloud compute tpus)
give_back() { "${tpus[@]}" queued-resources delete "$name" --zone "$zone" --force --quiet; }
if [[ -n "$delete" ]]; then give_back; exit; fi
[[ -n "$type" && $# -gt 0 ]] || usage

if [[ -z "$version" ]]; then
  case "$type" in
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) version=tpu-ubuntu2204-base ;;
  esac
fi

state() { "${tpus[@]}" queued-resources describe "$name" --zone "$zone" --format 'value(state.state)' 2>/dev/null || true; }

# Several slices are nodes of one request, named by its prefix: NAME-0, NAME-1, …
if ((slices > 1)); then nodes=(--node-count "$slices" --node-prefix "$name"); else nodes=(--node-id "$name"); fi

acquire() {
  while true; do
    case "$(state)" in
      ACTIVE) return ;;
      "") echo "asking for $slices x $type"
        "${tpus[@]}" queued-resources create "$name" --zone "$zone" --accelerator-type "$type" \
          --runtime-version "$version" "${nodes[@]}" ${spot:+--spot} --quiet ||
          # It may be there, and was not found because of the network.
          [[ -n "$(state)" ]] ;;
      FAILED | SUSPENDING | SUSPENDED) echo "the slices are gone"; give_back || sleep "${WAIT:-30}" ;;
      *) sleep "${WAIT:-30}" ;;
    esac
  done
}

root="$(cd "$(dirname "$0")/../.." && pwd)"
archive="$(mktemp -d)/optjax.tar.gz"
trap 'rm -rf "$(dirname "$archive")"' EXIT
# What an installation takes, and none of the runs and environments that may lie beside it.
tar -czf "$archive" -C "$root" pyproject.toml README.md LICENSE optjax sharding train
# Arguments go through a shell on the other side.
arguments="$(printf ' %q' "$@")"
install="mkdir -p checkout && tar -xzf optjax.tar.gz -C checkout &&
  python3 -m venv venv && venv/bin/pip install --quiet './checkout[tpu,train]'"

ssh_all() {
  local pids=() status=0 slice node
  for ((slice = 0; slice < slices; slice++)); do
    node="$name"; ((slices > 1)) && node="$name-$slice"
    "${tpus[@]}" tpu-vm ssh "$node" --zone "$zone" --worker all --quiet --command "$1" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
  return "$status"
}

copy_all() {
  local slice node
  for ((slice = 0; slice < slices; slice++)); do
    node="$name"; ((slices > 1)) && node="$name-$slice"
    "${tpus[@]}" tpu-vm scp "$archive" "$node:optjax.tar.gz" --zone "$zone" --worker all --quiet
  done
}

while true; do
  acquire
  # A status of 2 is pretrain's own word; what fails before may go another time.
  status=1
  if copy_all && ssh_all "$install"; then
    status=0
    ssh_all "venv/bin/python -m optjax.train.pretrain$arguments" || status=$?
  fi
  case "$status" in
    0) echo "finished; tpu.sh --name $name --zone $zone --delete gives the slices back"; exit 0 ;;
    2) echo "the command is wrong: see above" >&2; exit 2 ;;
    *) echo "ended with status $status; starting again" >&2; sleep "${WAIT:-30}" ;;
  esac
done
