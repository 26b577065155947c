#!/usr/bin/env bash
# One host, all of its GPUs; without GPUs, RANKS processes on its cores.
#
#   DATA=data/mine OUT=runs/mine launchers/torchrun_one_node.sh [--any.setting value ...]
#
# DATA   shards made by `python -m sharding build`; empty: the bundled digits
# OUT    run directory (default runs/mine); the same command goes on where a run was interrupted
# RANKS  processes (default: one per GPU, else 2)
# BIN    directory of python and torchrun (default .venv/bin)
set -euo pipefail

BIN=${BIN:-.venv/bin}
gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
RANKS=${RANKS:-$((gpus > 0 ? gpus : 2))}

# SIGUSR1 too is passed on to the ranks, which save and leave; by default it ends torchrun and orphans them.
exec "$BIN/torchrun" --standalone --nproc_per_node="$RANKS" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -m gdd_dist.train \
    ${DATA:+--data "$DATA"} --out "${OUT:-runs/mine}" "$@"
