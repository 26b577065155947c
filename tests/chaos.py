"""Kills at random: which, where and when are drawn from a seed. What they hit is looked at after each. Holds no test."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hooks
import numpy as np
import ranks
import torch
from safetensors.torch import load_file

STEPS = (
    "teachers",
    "gan",
    "matching",
    "training.classifier_fit.train_step",
)
KINDS = ("rank", "job", "checkpoint", "logit file", "rename")


@dataclass(frozen=True)
class Kill:
    """``kind``: what is hit; ``when``: after so many of its events, counted over the life of each process."""

    kind: str
    when: int


def kills(seed: int, count: int) -> Iterator[Kill]:
    """A sequence of kills in which each kind comes equally often."""
    draw = random.Random(seed)
    drawn: list[str] = []
    for _ in range(count):
        if not drawn:
            drawn = draw.sample(KINDS, len(KINDS))
        yield Kill(drawn.pop(), draw.randrange(1, 9))


def arm(rank: int, kill: Kill, marker: Path) -> None:
    """In a rank: die where ``kill`` says; whichever rank is there first dies, and no other."""
    left = [kill.when]

    def event() -> None:
        left[0] -= 1
        if left[0] <= 0:
            hooks._die_once(marker)

    if kill.kind in ("rank", "job"):
        for where in STEPS:
            hooks.before_each_call(where, event)
    elif kill.kind == "rename":
        _around_renames(event)
    else:
        _in_flushes("/checkpoints/" if kill.kind == "checkpoint" else ".npy.", left, marker)


def _around_renames(event: Callable[[], None]) -> None:
    """An event before and one after each rename."""
    for owner, name in ((os, "rename"), (os, "replace"), (Path, "replace")):
        inner = getattr(owner, name)

        def wrapped(*args: Any, inner: Callable[..., Any] = inner) -> Any:
            event()
            result = inner(*args)
            event()
            return result

        setattr(owner, name, wrapped)


def _in_flushes(part: str, left: list[int], marker: Path) -> None:
    """Die with half of a temporary file written."""
    inner = os.fsync

    def fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if part in path and path.endswith(".tmp"):
            left[0] -= 1
            if left[0] <= 0:
                hooks._die_once(marker, lambda: os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2))
        inner(descriptor)

    os.fsync = fsync


def live(out: Path, argv: list[str], size: int, kill: Kill, marker: Path) -> bool:
    """Start the job and let ``kill`` hit it; True when it did, False when the job had ended well before."""
    job = ranks.start(out, argv, size, before=functools.partial(arm, kill=kill, marker=marker))
    dead = -signal.SIGKILL
    while job.running and not any(p.exitcode == dead for p in job.processes):
        for process in job.processes:
            process.join(0.01)
    if kill.kind == "job":
        job.send(signal.SIGKILL)
    ended = job.wait_as_torchrun()
    assert not ended.errors, ended.text
    if dead not in ended.codes:
        assert set(ended.codes) == {0}, ended.text
        return False
    return True


def assert_nothing_torn(out: Path) -> None:
    """Every file that has its final name is whole."""
    for path in (p for p in out.rglob("*") if p.is_file() and not p.name.startswith(".")):
        if path.suffix == ".json":
            record = json.loads(path.read_text())
            if path.name.startswith("step-"):
                data = path.with_suffix(".pt").read_bytes()
                assert hashlib.sha256(data).hexdigest() == record["sha256"], path
        elif path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".npy":
            np.load(path, allow_pickle=False)
        elif path.suffix == ".lock":
            assert {"host", "pid", "id"} <= json.loads(path.read_text()).keys()
        elif path.suffix == ".jsonl":  # its last line may be cut short, no other
            lines = [line for line in path.read_text().splitlines() if line]
            assert all(json.loads(line) for line in lines[:-1])
        assert path.suffix not in (".png", ".md", ".yaml") or path.stat().st_size, path
    for contents in out.glob("*/*/contents.json"):
        if contents.parent.suffix != ".partial":
            for name, entry in json.loads(contents.read_text())["files"].items():
                data = (contents.parent / name).read_bytes()
                assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"]), name
