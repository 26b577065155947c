"""A split decoded once: STORE/cache/<key>/<split>/images.u8, uint8 [N, H, W, C] in sample order, memory-mapped by all ranks of a host.

images.json beside it holds its size and sha256. It is written last, so a file without it is unfinished. The key names the
data and the versions of the decoders.
"""

import errno
import hashlib
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from gdd_dist.data.workers import Workers, prefetch
from gdd_dist.runtime.locks import Lock, holding
from gdd_dist.runtime.memory import free_memory
from gdd_dist.runtime.monitor import Monitor, say
from gdd_dist.storage.json_files import fingerprint, read_json, write_json
from sharding.errors import UserError
from sharding.files import atomic_file, remove_temporaries
from sharding.manifest import Manifest
from sharding.pool import available_cores

FILE, NOTE = "images.u8", "images.json"
FORMAT = "gdd-decoded/1"
CHUNK_BYTES = 32 * 2**20
MEMORY_SHARE, DISK_SHARE, DEVICE_SHARE = 0.25, 0.5, 0.25
"""Largest shares of the host's free memory, of the free disk, and of a GPU's free memory that "auto" uses."""

Fill = Callable[[np.ndarray, np.ndarray, Workers], None]
"""``fill(indices, out, workers)``: decode samples into uint8 [n, H, W, C]."""


def fits(resident: str, size: int, cache: Path | None, device: torch.device, there: bool) -> str:
    """Return where ``size`` bytes of decoded images are kept: none, ram or device. ``there``: the file exists already."""
    on_gpu = device.type == "cuda"
    if resident != "auto":
        return "ram" if resident == "device" and not on_gpu else resident
    if not there and (size > free_memory() * MEMORY_SHARE or (cache and size > _disk(cache) * DISK_SHARE)):
        return "none"
    if on_gpu and size <= torch.cuda.mem_get_info(device)[0] * DEVICE_SHARE:
        return "device"
    return "ram"


class Decoded:
    """The file of one split below ``cache``."""

    def __init__(self, cache: Path, manifest: Manifest, split: str) -> None:
        self._directory, self._split = cache / key(manifest) / split, split
        self._row = (manifest.height, manifest.width, manifest.channels)
        self.path, self._note = self._directory / FILE, self._directory / NOTE

    @property
    def there(self) -> bool:
        """Whether it is finished."""
        return self._note.exists()

    def open(self, fill: Fill, samples: int) -> np.ndarray:
        """Map it, uint8 [samples, H, W, C]. If it is missing, one process builds it on all cores, and the others wait.

        Raises OSError when it cannot be written, UserError when its size is not that in images.json.
        """
        shape = (samples, *self._row)
        if not self.there:
            self._directory.mkdir(parents=True, exist_ok=True)
            with self._alone_on_this_host():
                if not self.there:
                    lock = Lock(self._directory.with_suffix(".lock"))
                    with holding(lock, lambda holder: None):  # another host is decoding it
                        if not self.there:
                            self._build(fill, samples)
        size = int(np.prod(shape))
        found = self.path.stat().st_size if self.path.exists() else 0
        if found != size:
            what = f"{self.path} has {found} bytes instead of {size}"
            raise UserError(f"{what}; remove {self._directory} to decode it again")
        # Copy on write, because torch wants writable memory, and the file must not change.
        return np.memmap(self.path, dtype=np.uint8, mode="c", shape=shape).view(np.ndarray)

    @contextmanager
    def _alone_on_this_host(self) -> Iterator[None]:
        """One process of a host at a time, so that not all ranks try to lock a file on a disk that hosts may share.

        The first process gets it, because ranks run independently; the kernel frees it when the process ends.
        """
        name = f"\0gdd_dist-{os.getuid()}-{hashlib.sha256(os.fsencode(self._directory.absolute())).hexdigest()[:32]}"
        with socket.socket(socket.AF_UNIX) as claim:
            while not self.there:
                try:
                    claim.bind(name)
                    break
                except OSError as e:
                    if e.errno != errno.EADDRINUSE:  # this system has no abstract sockets
                        break
                    time.sleep(0.2)
            yield

    def parts(self, samples: int) -> tuple[Callable[[int], np.ndarray], range]:
        """Return how the file is built: a function part number → sample numbers, and the range of part numbers."""
        rows = max(1, CHUNK_BYTES // int(np.prod(self._row)))
        return (lambda part: np.arange(part * rows, min((part + 1) * rows, samples))), range(-(-samples // rows))

    def _build(self, fill: Fill, samples: int) -> None:
        remove_temporaries(self._directory)
        say(f"{self._split}: decoding {samples:,} images once, into {self.path}")
        workers, digest = Workers(available_cores()), hashlib.sha256()
        rows_of, numbers = self.parts(samples)

        def decoded(number: int) -> np.ndarray:
            indices = rows_of(number)
            out = np.empty((len(indices), *self._row), dtype=np.uint8)
            fill(indices, out, workers)
            return out

        monitor = Monitor(None, f"{self._split}: decoding", samples, unit="image", passing=True)
        with atomic_file(self.path) as stream:
            done = 0
            for part in prefetch(decoded, numbers.start, numbers.stop, 2):
                stream.write(part.data)
                digest.update(part.data)
                done += len(part)
                monitor.advance(done)
        monitor.close()
        size = self.path.stat().st_size
        write_json(self._note, {"format": FORMAT, "bytes": size, "sha256": digest.hexdigest()})

    def give_up(self, fault: OSError) -> None:
        """Report why decoded images cannot be kept, so that they are decoded at each read."""
        where = f"{self._directory} ({fault.strerror or fault})"
        say(f"{self._split}: cannot keep decoded images in {where}; images are decoded at each read instead")


def key(manifest: Manifest) -> str:
    """Return a key of everything that determines the decoded bytes."""
    decoders = {name: version(name) for name in ("simplejpeg", "pillow")}
    return fingerprint({"format": FORMAT, "data": manifest.fingerprint, "decoders": decoders})


def decoded_files(cache: Path, manifest: Manifest, splits: Sequence[str]) -> list[tuple[Path, int, str, Path]]:
    """Return (path, bytes, sha256, directory) of each finished file of these splits, for verification before use."""
    places = [cache / key(manifest) / split for split in splits]

    def noted(place: Path) -> tuple[int, str]:
        remedy = f"remove {place} and run the same command again; the images are decoded anew"
        return read_json(place / NOTE, lambda note: (int(note["bytes"]), str(note["sha256"])), remedy)

    return [(place / FILE, *noted(place), place) for place in places if (place / NOTE).exists()]


def _disk(path: Path) -> int:
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free
