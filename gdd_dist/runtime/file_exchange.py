"""Hosts that do not share a disk: the files of a step are sent from one host to the others through the process group.

Whether a disk is shared is detected at the start, not configured: rank 0 writes a file with a new random name, and the others
look for it. The sha256 of every received file is checked before the file gets its final name.
"""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gdd_dist.runtime.world import World
from gdd_dist.storage.store import CHECKPOINTS, CONTENTS, Store
from sharding.errors import UserError
from sharding.files import atomic_file, sha256_file

CHUNK = 2**24
PATIENCE = 3.0
"""Seconds that a network file system may take to show a new file."""


class Disks:
    """Which ranks share rank 0's disk. Without a world, or if all ranks share it, the methods do nothing.

    One rank is responsible for each disk: rank 0, and the first rank of each host that does not see rank 0's disk. Only these
    ranks send files, in few messages; the others wait in a barrier through the store, which is not a collective.
    """

    def __init__(self, world: World | None = None, root: Path = Path()) -> None:
        self._world, self.apart, self._keepers = world, frozenset[int](), [0]
        self._hosts: World | None = None
        if world is not None and world.size > 1:
            self.apart = frozenset(r for r, sees in enumerate(_who_sees(world, root)) if not sees)
            keeps = world.gather(world.is_main or (world.rank in self.apart and world.local_rank == 0))
            self._keepers = [r for r, one in enumerate(keeps) if one]
            self._hosts = None if self.shared else world.part(self._keepers)

    @property
    def shared(self) -> bool:
        """Whether all ranks see rank 0's files."""
        return not self.apart

    def among(self, world: World) -> Disks:
        """Return the disks that ``world``, a part of this world with its first ranks, uses. All ranks of this world call it."""
        fewer = copy.copy(self)
        fewer._world, fewer.apart = world, frozenset(r for r in self.apart if r < world.size)
        fewer._keepers = [r for r in self._keepers if r < world.size]
        fewer._hosts = None if fewer.shared or self._world is None else self._world.part(fewer._keepers)
        return fewer

    def share(self, directory: Path, patterns: Sequence[str]) -> None:
        """Give every host each file below ``directory`` that any host has. Of files with one name the longest is sent, because some
        files are only appended to. All ranks call it.
        """
        if self._world is None or self._hosts is None:
            return
        if self._hosts.rank >= 0:
            held = self._hosts.gather(_listed(directory, patterns, lambda p: p.stat().st_size))
            for name in sorted({name for files in held for name in files}):
                sizes = [files.get(name, -1) for files in held]
                source = sizes.index(max(sizes))
                if min(sizes) < sizes[source]:
                    self._send(directory / name, source, sizes[source], [size < sizes[source] for size in sizes])
        self._world.barrier()

    def mirror(self, directory: Path, patterns: Sequence[str]) -> None:
        """Give every host rank 0's version of each file below ``directory``. All ranks call it."""
        if self._world is None or self._hosts is None:
            return
        if self._hosts.rank >= 0:
            held = self._hosts.gather(_listed(directory, patterns, lambda p: [p.stat().st_size, sha256_file(p)]))
            for name, file in sorted(held[0].items(), key=lambda item: (Path(item[0]).name == CONTENTS, item[0])):
                lacks = [files.get(name) != file for files in held]
                if any(lacks):
                    self._send(directory / name, 0, file[0], lacks)
        self._world.barrier()

    def bring(self, store: Store, step: str, fp: str) -> None:
        """Send a step that is finished on rank 0's host to every other host."""
        if self._world is None or self._hosts is None:
            return
        partial, whole = store.partial(step, fp), store.path(step, fp)
        if self._hosts.rank > 0 and partial.exists():
            shutil.rmtree(partial / CHECKPOINTS, ignore_errors=True)
            if not whole.exists():
                os.rename(partial, whole)  # without its list of contents, the step is not finished
        self._world.barrier()
        self.mirror(whole, ["*"])

    def _send(self, path: Path, source: int, size: int, lacks: Sequence[bool]) -> None:
        """Send one file of ``size`` bytes, in pieces, from host ``source`` to one rank of each host that lacks it."""
        hosts = self._hosts
        assert hosts is not None
        here, writes = hosts.rank == source, lacks[hosts.rank]
        sha256 = torch.tensor(list(bytes.fromhex(sha256_file(path)) if here else bytes(32)), dtype=torch.uint8)
        dist.broadcast(sha256, group=hosts.group, group_src=source)
        found = hashlib.sha256()
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
        file: AbstractContextManager[Any] = path.open("rb") if here else atomic_file(path) if writes else nullcontext()
        with file as f:
            for start in range(0, size, CHUNK):
                n = min(CHUNK, size - start)
                data = bytearray(f.read(n) if here else n)
                dist.broadcast(torch.frombuffer(data, dtype=torch.uint8), group=hosts.group, group_src=source)
                if writes:
                    found.update(data)
                    f.write(data)
            if writes and found.digest() != sha256.numpy().tobytes():
                what = f"{path} was damaged while it was sent from rank {self._keepers[source]}"
                raise UserError(f"{what}; run the same command again")


def _listed(directory: Path, patterns: Sequence[str], about: Callable[[Path], Any]) -> dict[str, Any]:
    """Return file name → ``about(path)`` for the files below ``directory``."""
    found = {p for pattern in patterns for p in directory.rglob(pattern)}
    return {str(p.relative_to(directory)): about(p) for p in found if p.is_file() and not p.name.startswith(".")}


def _who_sees(world: World, root: Path) -> list[Any]:
    """Return for each rank whether it sees a file that rank 0 writes into ``root``."""
    root.mkdir(parents=True, exist_ok=True)
    name = world.broadcast(f".shared-{uuid.uuid4().hex}" if world.is_main else None)
    if world.is_main:
        (root / name).touch()
    world.barrier()
    deadline = time.monotonic() + PATIENCE
    while not (sees := (root / name).exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    everyone = world.gather(sees)
    if world.is_main:
        (root / name).unlink()
    return everyone
