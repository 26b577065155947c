"""Reads images of a split by sample number: memory map, index, decoding threads, reused uint8 batches."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from torch import Tensor

from gdd_dist.data.decoded_cache import Decoded, fits
from gdd_dist.data.pixels import to_float as to_float
from gdd_dist.data.pixels import to_uint8 as to_uint8
from gdd_dist.data.remote import Ahead, Batch, mirror_of
from gdd_dist.data.transfer import Beside
from gdd_dist.data.workers import Buffers, PinnedBuffers, Workers
from gdd_dist.data.workers import prefetch as prefetch
from sharding.errors import UserError
from sharding.manifest import Manifest
from sharding.shards import Shards, decode


class Images:
    """Random access to a split: ``read(indices)`` → uint8 [B, C, H, W]. Safe to use from several threads.

    ``resident`` says where decoded images are kept: "none" nowhere, "ram" in a file below ``cache`` that all ranks of a host map,
    "device" also on ``device`` (for a CPU this is the same as ram), "auto" in the fastest of these with enough space. Without
    ``cache`` nothing is kept or written.
    """

    def __init__(
        self,
        data: Path,
        manifest: Manifest,
        split: str,
        *,
        threads: int = 1,
        resident: str = "auto",
        cache: Path | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._mirror = mirror_of(data)
        remote = (self._mirror.open, self._mirror.open_shards) if self._mirror is not None else ()
        self.shards = Shards(data, manifest, split, *remote)
        self._infos = manifest.splits[split].shards
        self.labels = self.shards.labels
        self.shape = (manifest.height, manifest.width, manifest.channels)
        self._data, self._pool = data, Workers(threads)
        self._device = device or torch.device("cpu")
        on_gpu = self._device.type == "cuda"
        self._beside = Beside(self._device)
        self._buffers: Buffers | PinnedBuffers = PinnedBuffers() if on_gpu else Buffers()
        self._decoded = Decoded(cache, manifest, split) if cache else None
        size = int(np.prod(self.shape)) * self.shards.samples
        self.resident = fits(resident, size, cache, self._device, self._decoded is not None and self._decoded.there)
        self.resident_bytes = 0 if self.resident == "none" else size
        """Bytes of the decoded images that are kept, 0 if none are."""
        self._asked, self._lock = resident, threading.Lock()
        self._ahead: Ahead | None = None
        self._kept: np.ndarray | None = None
        self._on_device: Tensor | None = None

    def __len__(self) -> int:
        return self.shards.samples

    def expect(self, batch: Batch, start: int, stop: int) -> None:
        """Announce ``read(batch(step))`` for each step from ``start`` to ``stop``; ``batch`` is a pure function.

        Shards of a remote data set are then downloaded ahead, in the order in which they are needed.
        """
        if self.resident == "none":  # otherwise each sample is decoded once, in file order
            self._follow(batch, range(start, stop))

    def _follow(self, batch: Batch, steps: range) -> None:
        if self._ahead is not None:
            self._ahead.close()
        if self._mirror is not None:
            self._ahead = Ahead(self._mirror.ahead, self._mirror.room, self._infos, batch, steps)

    def read(self, indices: np.ndarray) -> Tensor:
        """Return images by sample number, uint8 [B, C, H, W], on the GPU if there is one.

        The memory of a batch is reused when no reference to it is left. Raises UserError that names the shard of an image that
        does not decode to the manifest's size, IndexError for an unknown sample.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if self._decoded is not None and self.resident != "none":
            self._keep(self._decoded)
        if self._on_device is not None:
            return self._picked(self._on_device, torch.from_numpy(indices)).permute(0, 3, 1, 2)
        batch, out = self._buffers.take((len(indices), *self.shape))
        if self._kept is None:
            self._decode_rows(indices, out, self._pool)
        elif len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self._kept):
            raise IndexError(f"a sample outside 0 … {len(self._kept) - 1}")
        else:
            np.take(self._kept, indices, axis=0, out=out, mode="clip")  # mode "raise" would copy twice
        return self._beside(lambda: batch.permute(0, 3, 1, 2).to(self._device, non_blocking=True))

    def _keep(self, decoded: Decoded) -> None:
        """Map the decoded split, decoding it first if necessary; if that fails under "auto", continue without it."""
        if self._kept is not None or self._on_device is not None:
            return
        with self._lock:
            if self._kept is not None or self._on_device is not None or self.resident == "none":
                return
            if not decoded.there:
                self._follow(*decoded.parts(self.shards.samples))
            try:
                kept = decoded.open(self._decode_rows, self.shards.samples)
            except OSError as e:
                if self._asked != "auto":
                    raise
                decoded.give_up(e)
                self.resident = "none"
                return
            if self.resident == "device":
                self._on_device = torch.from_numpy(kept).to(self._device)
            else:
                self._kept = kept

    def _decode_rows(self, indices: np.ndarray, out: np.ndarray, workers: Workers) -> None:
        workers.share(self._decode, list(zip(indices.tolist(), self.shards.payloads(indices), out, strict=True)))
        if self._ahead is not None:
            self._ahead.advance()

    def _decode(self, samples: Iterator[tuple[int, memoryview, np.ndarray]]) -> None:
        jpeg, shape, space = simplejpeg.decode_jpeg, self.shape, "GRAY" if self.shape[2] == 1 else "RGB"
        sample = 0
        try:
            for sample, payload, image in samples:  # noqa: B007
                # The header is not parsed first, which would take 2 of 25 microseconds. The first byte is not read either, because
                # Python would hold the interpreter lock while a page is loaded. The decoder refuses an image too large for the row.
                try:
                    if jpeg(payload, space, False, False, 0, 0, 1, image).shape != shape:
                        raise ValueError("a JPEG of another size than the data set's")
                except ValueError:
                    if payload[0] == 0xFF:
                        raise
                    decode(payload, image)
        except ValueError as e:
            shard, row = self.shards.locate(sample)
            what = f"{self._data / self._infos[shard].file}, row {row}: {e}"
            raise UserError(f"{what}; rebuild the data set with python -m sharding build") from e

    def _picked(self, images: Tensor, rows: Tensor) -> Tensor:
        """Return rows of ``images``, which are on the device."""
        rows = rows.pin_memory()
        return self._beside(lambda: images[rows.to(self._device, non_blocking=True)])
