#!/usr/bin/env bash
# Several hosts, no scheduler: start this same command on each of them, within JOIN_SECONDS of each other.
#
#   NODES=4 HEAD=node1:29500 DATA=/shared/data OUT=/shared/runs/mine launchers/torchrun_many_nodes.sh [--any.setting value ...]
#
# NODES         hosts
# HEAD          NAME:PORT of one of them, reachable from all; it hosts the rendezvous
# RANKS         processes on each host (default: one per GPU, else 2)
# JOB           name of the job, the same on all hosts, another for each job that shares HEAD (default gdd)
# RESTARTS      how often the ranks are started anew after one has died; each time they go on from the checkpoint (default 3)
# IFACE         network interface between the hosts, where a host's name does not resolve to its address on it
# JOIN_SECONDS  how long to wait for the others (default 900)
# DATA OUT BIN  as in torchrun_one_node.sh. Without a shared disk OUT is a local path, DATA a full copy on each host.
set -euo pipefail

: "${NODES:?set NODES to the number of hosts}" "${HEAD:?set HEAD to NAME:PORT of one host, the same everywhere}"
BIN=${BIN:-.venv/bin}
gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
RANKS=${RANKS:-$((gpus > 0 ? gpus : 2))}
where=()
if [[ -n ${IFACE:-} ]]; then
    export GLOO_SOCKET_IFNAME=$IFACE NCCL_SOCKET_IFNAME=$IFACE
    address=$(ip -4 -o addr show dev "$IFACE" | awk '{split($4, a, "/"); print a[1]; exit}')
    where=(--local_addr="$address")
fi
# torchrun knows itself by its own name alone: tell it whether HEAD is one of this host's addresses.
head_address=$(getent ahostsv4 "${HEAD%:*}" | awk '{print $1; exit}')
is_host=0
if [[ $head_address == 127.* || " $(hostname -I) " == *" $head_address "* ]]; then
    is_host=1
fi

# A host that comes again after a loss asks the store of its own round for the ranks' store: one that torchrun shares between rounds is
# told there in the first alone, and it would wait for it in vain. So rank 0 hosts the ranks' store, anew in each round.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# SIGUSR1 too is passed on to the ranks, which save and leave; by default it ends torchrun and orphans them.
exec "$BIN/torchrun" --nnodes="$NODES" --nproc_per_node="$RANKS" --max_restarts="${RESTARTS:-3}" "${where[@]}" \
    --rdzv_backend=c10d --rdzv_endpoint="$HEAD" --rdzv_id="${JOB:-gdd}" \
    --rdzv_conf="join_timeout=${JOIN_SECONDS:-900},is_host=$is_host" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -m gdd_dist.train \
    ${DATA:+--data "$DATA"} --out "${OUT:-runs/mine}" "$@"
