"""The generator for a user's own code: ``gdd_dist.load_generator(OUT or FILE)``.

With a single ``generator.safetensors`` this needs only torch, numpy and safetensors. Shapes: N images, K classes, C H W.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from gdd_dist.data.noise import normal
from gdd_dist.data.pixels import CPU_DRAWS, forward_size, to_float, to_uint8
from gdd_dist.models.files import GENERATOR, load_generator_network
from gdd_dist.models.generator import ImageGenerator
from gdd_dist.storage.printable import printable
from sharding.errors import UserError

if TYPE_CHECKING:  # only soft labels need the teachers
    from gdd_dist.models.classifiers import Classifier

DRAW_BATCH = 250
Labels = Sequence[int] | np.ndarray | Tensor


def load_generator(path: str | Path, device: str | torch.device = "auto") -> Sampler:
    """Load the distilled generator of a run directory (OUT), a finished step's directory, or a ``generator.safetensors``.

    With a run directory, the sha256 of every file that is read is checked, and soft labels are available.
    ``device``: "auto" is CUDA if there is a GPU. Raises UserError (one line: what is wrong; what to do).
    """
    path = Path(os.path.expanduser(path))  # unlike pathlib's, it leaves the ~ of an unknown user as it is
    target = usable_device(device)
    if path.is_dir() and not (path / GENERATOR).exists():
        step = (path / "matching" / "latest").resolve()
        if not (step / GENERATOR).exists():
            raise UserError(f"{path} holds no finished generator; {_GIVE}")
        from gdd_dist.product.run_files import verify  # imported here, because a single file does not need it

        verify(step, GENERATOR)
        return Sampler(step / GENERATOR, target, step, path)
    file = path / GENERATOR if path.is_dir() else path
    if not file.is_file():  # opening a pipe would wait for its writer
        raise UserError(f"{path} {'is not a file' if file.exists() else 'does not exist'}; {_GIVE}")
    return Sampler(file, target)


def usable_device(device: str | torch.device) -> torch.device:
    """Return the device of that name; "auto": CUDA if there is a GPU. Raises UserError if it is not available."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError, TypeError, ImportError) as e:  # some devices are modules that torch lacks
        known = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UserError(f"device {device} is not available to torch here ({known}); give auto, cpu or cuda") from None


class Sampler:
    """Draws images of chosen classes. On one machine, equal calls return equal images, whatever was drawn before.

    ``classes``: names, in the order of class numbers. ``image_shape``: (C, H, W). ``meta``: the file's metadata: architecture,
    classes, provenance (data, settings, fingerprints, versions). ``network``: the torch module itself, frozen.
    """

    def __init__(self, file: Path, device: torch.device, step: Path | None = None, out: Path | None = None) -> None:
        network, self.meta = load_generator_network(file, _GIVE if step is None else None)
        self.network: ImageGenerator = network.to(device).eval().requires_grad_(False)
        self.file, self.device = file, device
        self._step, self._out = step, out
        self._teachers: list[Classifier] | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in printable form."""
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
        """Return uint8 images [N, C, H, W] on the device; image i is a function of (labels[i], seed, i).

        ``labels``: class numbers [N]. ``truncation``: latents are drawn from the normal distribution truncated at ± this value
        (Brock et al. 2019), usually 0.5 to 2: images of the same seed become more typical, and less varied.
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
        """Return a torch Dataset of ``ipc`` images per class, drawn at once and kept in memory on the CPU.

        Items: (uint8 [C, H, W], or the result of ``transform``; class number, or float32 [K] with ``soft_labels``).
        A larger ``ipc`` with the same seed contains the smaller set (within one level of 255). ``select``: see `stream`. Soft
        labels and ``select`` > 1 need a run directory.
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
        """Return ``total`` images, uint8 [N, C, H, W] on the device, and their labels 0, 1, …, K-1, 0, 1, …, int64 [N].

        ``first``: number of the first image, so that a large set can be drawn in parts.
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
        """Yield new batches without end, on the device: uint8 [B, C, H, W] with int64 [B], or float32 [B, K] with ``soft_labels``.

        Classes are balanced: each occurs once, in random order, before any occurs again. In a torch DataLoader with n workers,
        each worker yields every n-th batch, so that no batch occurs twice. ``select``: the run's teachers choose each image from
        so many draws, as in the report's rows with a choice; this teaches more, but drawing takes ``select`` times as long.
        """
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size} is too small; give at least 1")
        if select < 1:
            raise UserError(_SELECT.format(select))
        if soft_labels or select > 1:
            self._load_teachers()  # loaded now, so that errors occur before the first batch
        if soft_labels:
            self.label_temperature()
        from gdd_dist.data.order import dealt

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for turn in itertools.count():
                worker = get_worker_info()  # asked each time: a stream that has begun may be forked into the workers
                first = batch_size * (turn * worker.num_workers + worker.id if worker else turn)
                places = np.arange(first, first + batch_size)
                labels = dealt(seed, "stream/labels", places, len(self.classes))
                images = self._draw(labels, seed, "stream/z", places, truncation, select)
                yield images, self.soft_labels(images) if soft_labels else torch.from_numpy(labels).to(self.device)

        return batches()

    @torch.no_grad()
    def soft_labels(self, images: Tensor, temperature: float | None = None) -> Tensor:
        """Return the mean over the run's teachers (last snapshots) of softmax(logits / temperature): float32 [N, K] on the device.

        ``images``: uint8 [N, C, H, W], or float in [-1, 1], for example after augmentation, as in the report.
        ``temperature``: default: the run's ``report.label_temperature``. Raises UserError without a run directory.
        """
        from gdd_dist.training.soft_labels import soft_labels

        teachers = self._load_teachers()
        temperature = self.label_temperature() if temperature is None else _positive(temperature)
        x = to_float(images, self.device) if images.dtype == torch.uint8 else images.to(self.device)
        return soft_labels(teachers, x, temperature, self._precision)

    def label_temperature(self) -> float:
        """The run's ``report.label_temperature``. Raises UserError without a run directory, or naming a damaged config.yaml."""
        if self._out is None:
            raise UserError(_NO_RUN)
        import yaml  # imported here, because drawing from a single file does not need it

        path = self._out / "config.yaml"
        try:
            report = yaml.safe_load(path.read_bytes()).get("report") or {}
            return _positive(float(report.get("label_temperature", 1.0)))
        except (OSError, yaml.YAMLError, AttributeError, TypeError, ValueError, UserError) as e:
            why = " ".join(str(e).split())
            raise UserError(f"cannot read report.label_temperature in {path} ({why}); {_TRAIN_AGAIN}") from e

    def _load_teachers(self) -> list[Classifier]:
        if self._teachers is None:
            if self._step is None:
                raise UserError(_NO_RUN)
            from gdd_dist.product.run_files import load_teachers

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
            raise UserError(f"truncation {truncation} is not positive; give more than 0, such as 1.0, or None")
        if select < 1:
            raise UserError(_SELECT.format(select))
        parts = [torch.empty(0, *self.image_shape, dtype=torch.uint8, device=self.device)]
        with torch.inference_mode(False), torch.no_grad():
            batch = forward_size(self.device, DRAW_BATCH, CPU_DRAWS)
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
        """The precision of the run, which labels its report's students in it."""
        return str(self.meta.get("provenance", {}).get("precision", "float32"))


_GIVE = f"give a run directory (OUT) or a {GENERATOR}"
_SELECT = "select {} is too small; give at least 1, or 3 for the best of three draws"
_TRAIN_AGAIN = "run the same gdd_dist.train again, which writes this file anew"
_NO_RUN = "soft labels and select > 1 need the run's teachers; give load_generator the run directory (OUT) instead of a single file"


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
    """Map standard normal numbers to the normal distribution truncated at ± ``limit``, by quantiles, so that they move smoothly."""
    if limit is None or math.isinf(limit):
        return z
    low = torch.special.ndtr(torch.tensor(-limit, dtype=torch.float64))
    share = low + torch.special.ndtr(z.double()) * (1 - 2 * low)
    return torch.special.ndtri(share).clamp(-limit, limit).float()


def _positive(temperature: float) -> float:
    if not 0 < temperature < math.inf:
        raise UserError(f"temperature {temperature} is not positive; give more than 0, such as 1.0")
    return temperature


def _numbers(labels: Labels, classes: int) -> np.ndarray:
    """Return class numbers, int64 [N]. Raises UserError for other values."""
    array = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if array.ndim != 1 or (len(array) and not np.issubdtype(array.dtype, np.integer)):
        raise UserError(f"labels are {array.dtype} {array.shape}; give a list of class numbers 0 … {classes - 1}")
    if len(array) and (array.min() < 0 or array.max() >= classes):
        raise UserError(f"labels are from {array.min()} to {array.max()}; give class numbers 0 … {classes - 1}")
    return array.astype(np.int64)
