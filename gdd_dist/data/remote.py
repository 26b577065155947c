"""Data sets in object stores and behind web servers: s3://…, gs://…, https://….

A remote data set has a mirror in a local cache directory, named by its manifest's fingerprint: the manifest, all indexes, and the
shards that are being read. Shards are downloaded ahead, once for all ranks of a host, and checked by their sha256 before use. A
failed or wrong download is repeated after growing pauses. When the cache exceeds its limit, the least recently used shards are
removed.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gdd_dist.data.download import Source, locked, whole
from gdd_dist.data.location import is_remote
from gdd_dist.runtime.monitor import LINE_SECONDS, Monitor, say
from sharding.errors import UserError
from sharding.files import write_atomic
from sharding.manifest import FILE, Manifest, ShardInfo, parse_manifest
from sharding.progress import duration
from sharding.sizes import parse_size

DOWNLOADS = 2
"""Number of simultaneous downloads ahead per rank."""
INDEX_DOWNLOADS = 16
Batch = Callable[[int], np.ndarray]
"""Step → the sample numbers that it reads, int64."""


@dataclass(frozen=True)
class Cache:
    """The directory of mirrors, the largest total bytes of their shards, and the seconds for which a store may fail."""

    directory: Path
    limit: int
    patience: float

    @staticmethod
    def of(directory: str, limit: str, patience: float) -> Cache:
        """Create it from settings; the default directory is the user's cache. Raises UserError if there is neither."""
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        if not directory and home.startswith("~"):  # in a container, the user may have no passwd entry
            cure = "give --loader.cache_dir, or set HOME"
            raise UserError(f"there is no home directory for shards of a remote --data; {cure}")
        return Cache(Path(directory or f"{home}/gdd_dist/data"), parse_size(limit), patience)


_manifests: dict[str, Manifest] = {}
_mirrors: dict[Path, Mirror] = {}


def remote_manifest(data: str, patience: float) -> Manifest:
    """Return the manifest of a URL, downloaded once, whatever the ``patience`` of later callers."""
    if data not in _manifests:
        _manifests[data] = parse_manifest(Source(data, patience).content(FILE), f"{data}/{FILE}")
    return _manifests[data]


@cache
def open_data(data: str, cache: Cache) -> Path:
    """Return a data set's directory; for a remote one, its mirror with manifest and indexes, which `mirror_of` then finds."""
    if not is_remote(data):
        return Path(data)
    mirror = Mirror(data, remote_manifest(data, cache.patience), cache)
    _mirrors[mirror.directory] = mirror
    return mirror.directory


def mirror_of(directory: Path) -> Mirror | None:
    """Return the mirror that this process opened in ``directory``, or None."""
    return _mirrors.get(directory)


class Mirror:
    """A remote data set's files on this host."""

    def __init__(self, url: str, manifest: Manifest, cache: Cache) -> None:
        self._cache = cache
        self.directory = cache.directory / manifest.fingerprint
        self._source = Source(url, cache.patience)
        shards = [info for split in manifest.splits.values() for info in split.shards]
        largest = max(info.bytes for info in shards)
        if largest > cache.limit:
            raise UserError(f"--loader.cache_limit is smaller than a shard of {url} ({largest} bytes); raise it")
        self.open_shards = max(1, cache.limit // largest)
        """Largest number of open shards in a process, because an open file keeps its disk space after it is removed."""
        for split in manifest.splits:
            (self.directory / split).mkdir(parents=True, exist_ok=True)
        write_atomic(self.directory / FILE, manifest.to_bytes())
        self._tells = os.environ.get("LOCAL_RANK", "0") == "0"
        monitor = Monitor(None, "download: indexes", len(shards), unit="file", active=self._tells, passing=True)
        with ThreadPoolExecutor(INDEX_DOWNLOADS) as pool:
            for n, _ in enumerate(pool.map(self._index, _from_own_place(shards))):
                monitor.advance(n + 1)
        monitor.close()
        self._wanted: queue.SimpleQueue[ShardInfo] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._telling, self._told = threading.Lock(), time.monotonic()
        self._asked = self._here = self._said = 0  # bytes

    def _index(self, info: ShardInfo) -> None:
        path = self.directory / info.index_file
        with locked(path):
            if not path.exists():
                self._source.download(info.index_file, path, None, info.index_sha256)

    def open(self, info: ShardInfo) -> BinaryIO:
        """Return a shard opened for reading, downloaded if missing. Raises UserError when it cannot be downloaded intact."""
        path = self.directory / info.file
        while True:
            if whole(path, info.bytes):
                try:
                    stream = path.open("rb")
                    os.utime(path)  # marks the shard as used now, for the next removal
                    return stream
                except FileNotFoundError:  # removed after it was checked
                    continue
            self._fetch(info, wait=True)

    @property
    def room(self) -> int:
        """Return the bytes of shards that a rank may download ahead; half of the cache is for shards in use."""
        return self._cache.limit // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    def ahead(self, info: ShardInfo) -> None:
        """Download a shard in the background, after earlier requests, unless another rank is downloading it."""
        with self._telling:
            self._asked += info.bytes
        self._wanted.put(info)
        while len(self._threads) < DOWNLOADS:
            thread = threading.Thread(target=self._work, name="download", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _tell(self, size: int) -> None:
        """Count ``size`` more bytes. One process of a host prints progress and speed every LINE_SECONDS."""
        with self._telling:
            self._here += size
            passed = time.monotonic() - self._told
            if self._tells and passed > LINE_SECONDS:
                rate = max(self._here - self._said, 1) / passed
                left = f"{rate / 1e6:.1f} MB/s, {duration((self._asked - self._here) / rate)} left"
                say(f"download: {self._here / 1e6:,.0f} of {self._asked / 1e6:,.0f} MB, {left}")
                self._told, self._said = time.monotonic(), self._here

    def _work(self) -> None:
        while True:
            info = self._wanted.get()
            try:
                if not whole(self.directory / info.file, info.bytes):
                    self._fetch(info, wait=False)
                self._tell(info.bytes)
            except (UserError, OSError) as e:
                say(f"{info.file} could not be downloaded ahead ({e}); it will be downloaded when it is needed")

    def _fetch(self, info: ShardInfo, wait: bool) -> None:
        path = self.directory / info.file
        with locked(path, wait=wait) as mine:
            if mine and not whole(path, info.bytes):
                self._make_room(info.bytes)
                self._source.download(info.file, path, info.bytes, info.sha256)

    def _make_room(self, size: int) -> None:
        """Remove the least recently used shards of all mirrors until ``size`` more bytes fit the limit."""
        with locked(self._cache.directory / "room"):
            found = []
            for path in self._cache.directory.glob("*/*/*.tar"):
                try:
                    found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
                except FileNotFoundError:
                    continue
            total = sum(bytes_ for _, bytes_, _ in found) + size
            for _, bytes_, path in sorted(found):
                if total <= self._cache.limit:
                    return
                path.unlink(missing_ok=True)
                total -= bytes_

    def check(self, info: ShardInfo) -> None:
        """Check the files of a shard from an earlier run; a wrong file is downloaded again, now or when it is needed."""
        tar, index = self.directory / info.file, self.directory / info.index_file
        if not whole(index, None, info.index_sha256):
            say(f"{index} was altered; downloading it again")
            self._source.download(info.index_file, index, None, info.index_sha256)
        if tar.exists() and not whole(tar, info.bytes, info.sha256):
            say(f"{tar} was altered; it will be downloaded again")
            tar.unlink(missing_ok=True)


def _from_own_place(shards: list[ShardInfo]) -> list[ShardInfo]:
    """Return all shards; each rank of a host begins at a different one, so that together they download each index once."""
    rank, size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    first = len(shards) * rank // max(size, rank + 1)
    return [*shards[first:], *shards[:first]]


class Ahead:
    """A thread that requests the shards of the next batches, in the order in which they are used.

    Shards that are requested but not yet read take at most ``room`` bytes, or are one shard. The next shard is requested
    when the reader has finished one.
    """

    def __init__(
        self, download: Callable[[ShardInfo], None], room: int, shards: Sequence[ShardInfo], batch: Batch, steps: range
    ) -> None:
        """``download`` starts a download and returns at once. ``batch(step)`` must be a pure function."""
        self._download, self._room, self._shards = download, room, shards
        self._ends = np.cumsum([info.samples for info in shards])
        self._step, self._closed, self._news = steps.start, False, threading.Condition()
        self._thread = threading.Thread(target=self._follow, args=(batch, steps), name="ahead", daemon=True)
        self._thread.start()

    def advance(self) -> None:
        """Record that the reader has read one more batch."""
        with self._news:
            self._step += 1
            self._news.notify()

    def close(self) -> None:
        """Stop requesting shards, because other batches will be read than expected."""
        with self._news:
            self._closed = True
            self._news.notify()
        self._thread.join()

    def _follow(self, batch: Batch, steps: range) -> None:
        # Shard → the last known step that needs it, in the order of these steps.
        last = dict[int, int]()
        for step in steps:
            for shard in dict.fromkeys(np.searchsorted(self._ends, batch(step), side="right").tolist()):
                known = last.pop(shard, None) is not None
                last[shard] = step
                if known:
                    continue
                if not self._has_room(last):
                    return
                self._download(self._shards[shard])
            if self._closed or len(last) == len(self._shards):
                return

    def _has_room(self, last: dict[int, int]) -> bool:
        """Wait until the reader has finished so many shards that the others fit; return False after `close`."""
        while len(last) > 1 and sum(self._shards[shard].bytes for shard in last) > self._room:
            oldest, step = next(iter(last.items()))
            with self._news:
                while not self._closed and self._step <= step:
                    self._news.wait()
                if self._closed:
                    return False
            del last[oldest]
        return True
