#!/usr/bin/env bash
# DeepSpeed's own launcher: one host, or the hosts of a hostfile, reached by ssh from this one.
#
#   HOSTFILE=launchers/hostfile.example DATA=/shared/data OUT=/shared/runs/mine launchers/deepspeed.sh [--any.setting value ...]
#
# HOSTFILE   lines "HOST slots=RANKS"; without it this host alone
# RANKS      processes on this host (default: one per GPU, else 2); with a hostfile its slots count
# DS_CONFIG  JSON file that says where things live (default: ZeRO stage 1)
# MASTER     address of the first host, where its name does not resolve to the right one
# DATA OUT   as in torchrun_one_node.sh
# BIN        directory of python and deepspeed, the same on all hosts (default .venv/bin)
#
# Variables that the other hosts need (NCCL_SOCKET_IFNAME ...) go into ./.deepspeed_env or ~/.deepspeed_env, one NAME=value a line.
set -euo pipefail

BIN=${BIN:-.venv/bin}
gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
if ((gpus == 0)); then
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
fi
RANKS=${RANKS:-$((gpus > 0 ? gpus : 2))}
if [[ -n ${HOSTFILE:-} ]]; then
    where=(--hostfile "$HOSTFILE")
else
    where=(--hostfile /dev/null --num_gpus "$RANKS")
fi
if [[ -n ${MASTER:-} ]]; then
    where+=(--master_addr "$MASTER")
fi

# Of all signals DeepSpeed passes on SIGTERM alone, and on one host from the process that it starts, not from its own.
# shellcheck disable=SC2329 # called by the trap
stop() {
    if [[ -n ${HOSTFILE:-} ]]; then kill -TERM "$job"; else pkill -TERM -P "$job"; fi
}
trap stop INT TERM USR1

PATH="$BIN:$PATH" "$BIN/deepspeed" "${where[@]}" --master_port "${PORT:-29500}" --module gdd_dist.train \
    --engine deepspeed ${DS_CONFIG:+--deepspeed-config "$DS_CONFIG"} \
    ${DATA:+--data "$DATA"} --out "${OUT:-runs/mine}" "$@" &
job=$!

status=0
while kill -0 "$job" 2>/dev/null; do # a signal ends `wait` before its process has ended
    wait "$job" && status=0 || status=$?
done
exit "$status"
