"""Hosts that do not share a disk: what a step left on one of them is sent to the others through the process group.

Whether a disk is shared is found out at the start, not configured: rank 0 writes a file of a name never seen before, the others
look for it. Every file that arrives is checked by its sha256 before it gets its name.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gdd_dist.runtime.world import World
from gdd_dist.storage.store import CHECKPOINTS, CONTENTS, Store
from sharding.errors import UserError
from sharding.files import fsync_dir, sha256_file

CHUNK = 2**24
PATIENCE = 3.0
"""Seconds that a network file system may take to show a new file."""


class Disks:
    """Who shares rank 0's disk. Without a world, or where all do, everything here does nothing."""

    def __init__(self, world: World | None = None, root: Path = Path()) -> None:
        self._world, self.apart = world, frozenset[int]()
        if world is not None and world.size > 1:
            self.apart = frozenset(r for r, sees in enumerate(_who_sees(world, root)) if not sees)

    @property
    def shared(self) -> bool:
        """Whether all ranks see rank 0's files."""
        return not self.apart

    @property
    def _keeper(self) -> bool:
        """Whether this rank looks after its host's disk: rank 0, and the first rank of each host that lacks rank 0's."""
        assert self._world is not None
        return self._world.is_main or (self._world.rank in self.apart and self._world.local_rank == 0)

    def share(self, directory: Path, patterns: Sequence[str]) -> None:
        """Afterwards every host has each file below ``directory`` that any host has, the longest of each name: some are only ever
        appended to. All ranks call it.
        """
        if self.shared or self._world is None:
            return
        mine = {str(p.relative_to(directory)): p.stat().st_size for p in _files(directory, patterns)}
        held = self._world.gather(mine if self._keeper else None)
        for name in sorted({name for files in held if files is not None for name in files}):
            sizes = {r: files.get(name, -1) for r, files in enumerate(held) if files is not None}
            source = max(sizes, key=lambda r: (sizes[r], -r))
            if lacking := [r for r, size in sizes.items() if size < sizes[source]]:
                self._send(directory / name, source, lacking)

    def mirror(self, directory: Path, patterns: Sequence[str]) -> None:
        """Afterwards every host has rank 0's files below ``directory``, and rank 0's version of each. All ranks call it."""
        if self.shared or self._world is None:
            return
        mine = None
        if self._keeper:
            mine = {str(p.relative_to(directory)): sha256_file(p) for p in _files(directory, patterns)}
        held = self._world.gather(mine)
        for name, sha256 in sorted(held[0].items(), key=lambda item: (Path(item[0]).name == CONTENTS, item[0])):
            lacking = [r for r, files in enumerate(held) if files is not None and files.get(name) != sha256]
            if lacking:
                self._send(directory / name, 0, lacking)

    def bring(self, store: Store, step: str, fp: str) -> None:
        """A step that is finished on rank 0's host becomes finished on every host."""
        if self.shared or self._world is None:
            return
        partial, whole = store.partial(step, fp), store.path(step, fp)
        if self._keeper and not self._world.is_main and partial.exists():
            shutil.rmtree(partial / CHECKPOINTS, ignore_errors=True)
            if not whole.exists():
                os.rename(partial, whole)  # without its list of contents it does not count as finished
        self._world.barrier()
        self.mirror(whole, ["*"])

    def _send(self, path: Path, source: int, lacking: Sequence[int]) -> None:
        """One file, in pieces, from rank ``source`` to those of ``lacking``; all ranks listen."""
        world = self._world
        assert world is not None
        here = world.rank == source
        size, sha256 = world.gather([path.stat().st_size, sha256_file(path)] if here else None)[source]
        temporary = path.with_name(f".tmp-{uuid.uuid4().hex}")
        writes = world.rank in lacking
        found = hashlib.sha256()
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
        with (path if here else temporary if writes else Path(os.devnull)).open("rb" if here else "wb") as f:
            for start in range(0, size, CHUNK):
                n = min(CHUNK, size - start)
                data = bytearray(f.read(n) if here else n)
                dist.broadcast(torch.frombuffer(data, dtype=torch.uint8), source)
                if writes:
                    found.update(data)
                    f.write(data)
            if writes:
                f.flush()
                os.fsync(f.fileno())
        if writes:
            if found.hexdigest() != sha256:
                temporary.unlink()
                raise UserError(f"{path} was damaged on its way from rank {source}; run the same command again")
            os.replace(temporary, path)
            fsync_dir(path.parent)


def _files(directory: Path, patterns: Sequence[str]) -> Iterator[Path]:
    found = {p for pattern in patterns for p in directory.rglob(pattern)}
    return iter(sorted(p for p in found if p.is_file() and not p.name.startswith(".tmp-")))


def _who_sees(world: World, root: Path) -> list[Any]:
    """By rank, whether it sees a file that rank 0 writes into ``root``."""
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
