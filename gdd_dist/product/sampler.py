"""The generator in a user's own code: ``gdd_dist.load_generator(OUT or FILE)``.

From a single ``generator.safetensors`` this needs nothing but torch, numpy and safetensors. Shapes: N images, K classes, C H W.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from gdd_dist.data.noise import normal
from gdd_dist.data.pixels import to_float, to_uint8
from gdd_dist.models.files import AGAIN, GENERATOR, load_generator_network, read_teachers
from gdd_dist.models.generator import ImageGenerator, draws_at_once
from gdd_dist.storage.json_files import read_json
from gdd_dist.storage.printable import printable
from sharding.errors import UserError

if TYPE_CHECKING:  # only soft labels need the teachers
    from gdd_dist.models.classifiers import Classifier

DRAW_BATCH = 250
Labels = Sequence[int] | np.ndarray | Tensor


def load_generator(path: str | Path, device: str | torch.device = "auto") -> Sampler:
    """The distilled generator of a run directory (OUT), of a finished step's directory, or of one ``generator.safetensors``.

    From a run directory every file that is read is checked against its sha256, and soft labels are to be had.
    ``device``: "auto" is CUDA where there is one. Raises UserError (one line: what is wrong; what to do).
    """
    path = Path(path).expanduser()
    target = usable_device(device)
    if path.is_dir() and not (path / GENERATOR).exists():
        step = (path / "matching" / "latest").resolve()
        if not (step / GENERATOR).exists():
            raise UserError(f"{path} holds no finished generator; {_GIVE}")
        verify(step, GENERATOR)
        return Sampler(step / GENERATOR, target, step, path)
    file = path / GENERATOR if path.is_dir() else path
    if not file.exists():
        raise UserError(f"{path} does not exist; {_GIVE}")
    return Sampler(file, target)


def usable_device(device: str | torch.device) -> torch.device:
    """The device of that name, "auto": CUDA where there is one. Raises UserError for one that is not here."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        known = str(e).strip().splitlines()[0]
        raise UserError(f"device {device} is none that torch can use here ({known}); give auto, cpu or cuda") from None


def verify(directory: Path, *names: str) -> None:
    """Raise UserError where files of a finished step are not as they were written."""
    from gdd_dist.storage.store import CONTENTS, verify_file

    files = read_json(directory / CONTENTS)["files"]
    for name in names:
        entry = files.get(name)
        if entry is None:
            raise UserError(f"{directory / name} is not a file of its step; remove {directory} to compute it again")
        cure = f"remove {directory} and run gdd_dist.train again"
        verify_file(directory / name, entry["bytes"], entry["sha256"], cure)


class Sampler:
    """Draws images of chosen classes. The same call gives the same images on one machine, whatever was drawn before.

    ``classes``: names, class number by place. ``image_shape``: (C, H, W). ``meta``: the file's metadata: architecture,
    classes, provenance (data, settings, fingerprints, versions). ``network``: the torch module itself, frozen.
    """

    def __init__(self, file: Path, device: torch.device, step: Path | None = None, out: Path | None = None) -> None:
        network, self.meta = load_generator_network(file, _GIVE if step is None else AGAIN)
        self.network: ImageGenerator = network.to(device).eval().requires_grad_(False)
        self.file, self.device = file, device
        self._step, self._out = step, out
        self._teachers: list[Classifier] | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, as they can be printed."""
        return tuple(map(printable, self.meta.get("classes") or map(str, range(self.network.classes))))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        net = self.network
        return net.channels, net.size, net.size

    @property
    def data_name(self) -> str:
        """Name of the data set that it was distilled from."""
        return printable(str(self.meta.get("provenance", {}).get("data", "unknown")))

    @torch.no_grad()
    def sample(self, labels: Labels, seed: int = 0, truncation: float | None = None) -> Tensor:
        """uint8 images [N, C, H, W] on the device, image i a function of (labels[i], seed, i).

        ``labels``: class numbers [N]. ``truncation``: each latent number is drawn from the normal distribution cut at
        ± this (Brock et al. 2019), 0.5 to 2 are usual: images of the same seed move towards the typical, and differ less.
        """
        numbers = _numbers(labels, len(self.classes))
        return self._draw(numbers, seed, "sample/z", np.arange(len(numbers)), truncation)

    def dataset(
        self,
        ipc: int,
        seed: int = 0,
        soft_labels: bool = False,
        truncation: float | None = None,
        transform: Callable[[Tensor], Any] | None = None,
        select: int = 1,
    ) -> DistilledSet:
        """A torch Dataset of ``ipc`` images of each class, drawn at once and kept in memory on the CPU.

        Items: (uint8 [C, H, W], or what ``transform`` makes of it; class number, or float32 [K] with ``soft_labels``).
        A larger ``ipc`` with the same seed holds the smaller set (within one level of 255). ``select``: as of `stream`. Soft labels
        and a choice need a run directory.
        """
        if ipc < 1:
            raise UserError(f"ipc {ipc} is too small; give at least 1")
        images, labels = self.balanced(ipc * len(self.classes), seed, truncation, select=select)
        soft = self.soft_labels(images).cpu() if soft_labels else None
        order = np.argsort(labels, kind="stable")
        take = torch.from_numpy(order)
        images = images.cpu()[take]
        return DistilledSet(images, torch.from_numpy(labels[order]), None if soft is None else soft[take], transform)

    def balanced(
        self, total: int, seed: int = 0, truncation: float | None = None, first: int = 0, select: int = 1
    ) -> tuple[Tensor, np.ndarray]:
        """``total`` images, uint8 [N, C, H, W] on the device, and their labels 0, 1, …, K-1, 0, 1, …, int64 [N].

        ``first``: number of the first image, so that a large set can be drawn part by part.
        """
        places = np.arange(first, first + total)
        labels = places % len(self.classes)
        return self._draw(labels, seed, "dataset/z", places, truncation, select), labels

    def stream(
        self,
        batch_size: int,
        seed: int = 0,
        soft_labels: bool = False,
        truncation: float | None = None,
        select: int = 1,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless fresh batches on the device: uint8 [B, C, H, W] with int64 [B], or float32 [B, K] with ``soft_labels``.

        Classes come evenly: each once, in random order, before any comes again. In a worker of a torch DataLoader the stream
        gives each n-th batch, so that the n workers give all of them, none twice. ``select``: of so many draws for each image the
        run's teachers choose one, as the report's chosen rows show them: it teaches more, and takes as many times as long.
        """
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size} is too small; give at least 1")
        if select < 1:
            raise UserError(_SELECT.format(select))
        if soft_labels or select > 1:
            self._load_teachers()  # now, not at the first batch
        return self._stream(batch_size, seed, soft_labels, truncation, select)

    def _stream(
        self, batch_size: int, seed: int, soft_labels: bool, truncation: float | None, select: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        from gdd_dist.data.order import dealt

        worker = get_worker_info()
        first, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        first *= batch_size
        while True:
            places = np.arange(first, first + batch_size)
            labels = dealt(seed, "stream/labels", places, len(self.classes))
            images = self._draw(labels, seed, "stream/z", places, truncation, select)
            yield images, self.soft_labels(images) if soft_labels else torch.from_numpy(labels).to(self.device)
            first += workers * batch_size

    @torch.no_grad()
    def soft_labels(self, images: Tensor, temperature: float | None = None) -> Tensor:
        """Mean over the run's teachers (last snapshots) of softmax(logits / temperature): float32 [N, K] on the device.

        ``images``: uint8 [N, C, H, W], or float in [-1, 1], say after your augmentation, as the report labels them.
        ``temperature``: by default the run's ``report.label_temperature``. Raises UserError without a run directory.
        """
        from gdd_dist.training.soft_labels import soft_labels

        teachers = self._load_teachers()
        if temperature is None:
            temperature = self.label_temperature()
        x = to_float(images, self.device) if images.dtype == torch.uint8 else images.to(self.device)
        return soft_labels(teachers, x, temperature, self._precision)

    def label_temperature(self) -> float:
        """The run's ``report.label_temperature``. Raises UserError without a run directory."""
        if self._out is None:
            raise UserError(_NO_RUN)
        import yaml  # who draws from a single file need not have it

        report = yaml.safe_load((self._out / "config.yaml").read_bytes()).get("report") or {}
        return float(report.get("label_temperature", 1.0))

    def _load_teachers(self) -> list[Classifier]:
        if self._teachers is None:
            if self._step is None:
                raise UserError(_NO_RUN)
            self._teachers = load_teachers(self._step, self.network, self.device)
        return self._teachers

    def _draw(
        self,
        labels: np.ndarray,
        seed: int,
        purpose: str,
        slots: np.ndarray,
        truncation: float | None,
        select: int = 1,
    ) -> Tensor:
        if truncation is not None and not truncation > 0:
            raise UserError(f"truncation {truncation} is not positive; give more than 0, say 1.0, or None for no cut")
        if select < 1:
            raise UserError(_SELECT.format(select))
        parts = [torch.empty(0, *self.image_shape, dtype=torch.uint8, device=self.device)]
        with torch.inference_mode(False), torch.no_grad():
            batch = draws_at_once(self.device, DRAW_BATCH)
            for i in range(0, len(labels), batch):
                y = torch.from_numpy(labels[i : i + batch]).to(self.device)
                draws = []
                for n in range(select):
                    z = torch.from_numpy(normal(seed, purpose, n, slots[i : i + len(y)], self.network.latent))
                    draws.append(to_uint8(self.network(truncated(z, truncation).to(self.device), y)))
                parts.append(draws[0] if select == 1 else self._chosen(torch.stack(draws), y))
        return torch.cat(parts)

    def _chosen(self, draws: Tensor, labels: Tensor) -> Tensor:
        from gdd_dist.training.soft_labels import chosen

        return chosen(self._load_teachers(), draws, labels, self._precision)

    @property
    def _precision(self) -> str:
        """The run's, in which its report's students are labelled."""
        return str(self.meta.get("provenance", {}).get("precision", "float32"))


_GIVE = f"give a run directory (OUT) or a {GENERATOR}"
_SELECT = "select {} is too small; give at least 1, or 3 for the best of three draws"
_NO_RUN = "soft labels and a choice need the run's teachers; give load_generator the run directory (OUT) instead of a single file"


class DistilledSet(Dataset[tuple[Any, Any]]):
    """A drawn set in memory. ``images`` uint8 [N, C, H, W], ``labels`` int64 [N], ``soft`` float32 [N, K] or None."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        soft: Tensor | None = None,
        transform: Callable[[Tensor], Any] | None = None,
    ) -> None:
        self.images, self.labels, self.soft, self.transform = images, labels, soft, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image = self.images[index]
        target = int(self.labels[index]) if self.soft is None else self.soft[index]
        return (image if self.transform is None else self.transform(image)), target


def truncated(z: Tensor, limit: float | None) -> Tensor:
    """Standard normal numbers → the normal distribution cut at ± ``limit``, each by its rank, so that they move smoothly."""
    if limit is None or math.isinf(limit):
        return z
    low = torch.special.ndtr(torch.tensor(-limit, dtype=torch.float64))
    share = low + torch.special.ndtr(z.double()) * (1 - 2 * low)
    return torch.special.ndtri(share).clamp(-limit, limit).float()


def load_teachers(step: Path, net: ImageGenerator, device: torch.device) -> list[Classifier]:
    """The last snapshots of the pool that a finished matching step was made with, frozen. Raises UserError where it is gone."""
    from gdd_dist.storage.store import CONTENTS, Store

    fp = read_json(step / CONTENTS)["provenance"]["fingerprints"]["teachers"]
    store = Store(step.parent.parent)
    if not store.finished("teachers", fp):
        raise UserError(f"{store.path('teachers', fp)} is gone; run the same gdd_dist.train again to compute it anew")
    chosen = [t for t in read_teachers(store.path("teachers", fp)) if t.last]
    verify(store.path("teachers", fp), *(t.path.name for t in chosen))
    return [t.load(net.channels, net.size, net.classes).to(device) for t in chosen]


def _numbers(labels: Labels, classes: int) -> np.ndarray:
    """Class numbers int64 [N]. Raises UserError for what is none."""
    array = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if array.ndim != 1 or (len(array) and not np.issubdtype(array.dtype, np.integer)):
        raise UserError(f"labels are {array.dtype} {array.shape}; give a list of class numbers 0 … {classes - 1}")
    if len(array) and (array.min() < 0 or array.max() >= classes):
        raise UserError(f"labels reach from {array.min()} to {array.max()}; this generator knows 0 … {classes - 1}")
    return array.astype(np.int64)
