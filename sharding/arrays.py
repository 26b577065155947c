"""Sources whose samples are pixels, not encoded files: digits, cifar10, cifar100."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sharding import cifar
from sharding.archives import open_files
from sharding.errors import UserError
from sharding.links import Member
from sharding.listing import PIXELS, Listing, Sample, Source
from sharding.splits import stratified


class ArrayReader:
    """Rows of a uint8 array [N, H, W, C] in a raw file, memory-mapped; a member's offset is its row."""

    _array: NDArray[np.uint8] | None = None

    def __init__(self, path: Path, shape: tuple[int, int, int, int]) -> None:
        self.path, self.shape = path, shape

    def read(self, member: Member) -> NDArray[np.uint8]:
        """Return pixels [H, W, C]."""
        if self._array is None:
            self._array = np.memmap(self.path, np.uint8, "r", shape=self.shape)
        return np.asarray(self._array[member.offset])

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "shape": self.shape}


class Digits(Source):
    """scikit-learn's bundled handwritten digits: 1,797 images of 8×8, here 16×16 bilinear, one channel."""

    usage = "digits"
    TEST, VAL = 360, 240

    def listing(self) -> Listing:
        """List the digits; test is stratified with seed 0 whatever the build's seed."""
        if self.argument:
            raise UserError("digits takes no path; write digits alone")
        import sklearn
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        pixels = np.stack([self._enlarge(image.reshape(8, 8)) for image in images])
        path = self.scratch / PIXELS
        pixels.tofile(path)
        test = stratified(labels, self.TEST, seed=0, purpose="test")
        splits: dict[str, list[Sample]] = {"train": [], "test": []}
        for i, (label, in_test) in enumerate(zip(labels.astype(int).tolist(), test, strict=True)):
            splits["test" if in_test else "train"].append(Sample(Member(f"digit {i}", 16 * 16, offset=i), label))
        versions = {"scikit-learn": sklearn.__version__}
        return Listing("digits", tuple("0123456789"), splits, ArrayReader(path, pixels.shape), self.VAL, versions)

    @staticmethod
    def _enlarge(image: NDArray[np.float64]) -> NDArray[np.uint8]:
        """Return uint8 [16, 16, 1] in 0 … 255 from [8, 8] in 0 … 16."""
        large = Image.fromarray((image * (255 / 16)).astype(np.float32)).resize((16, 16), Image.Resampling.BILINEAR)
        return np.rint(np.asarray(large)).clip(0, 255).astype(np.uint8)[:, :, None]


class Cifar(Source):
    """A published CIFAR python archive or its directory."""

    variant: ClassVar[cifar.Variant]

    def listing(self) -> Listing:
        """List the images; they are unpickled once, into an array in `scratch` that all workers map."""
        archive = cifar.Archive(open_files(self.argument, self.scratch), self.variant)
        classes = archive.classes()
        path = self.scratch / PIXELS
        splits: dict[str, list[Sample]] = {"train": [], "test": []}
        rows = 0
        with path.open("wb") as stream:
            for split, files in (("train", self.variant.train), ("test", self.variant.test)):
                for file in files:
                    pixels, labels = archive.batch(file, len(classes))
                    stream.write(np.ascontiguousarray(pixels).data)
                    for i, label in enumerate(labels):
                        splits[split].append(Sample(Member(f"{file}[{i}]", cifar.PIXELS, offset=rows + i), label))
                    rows += len(labels)
        reader = ArrayReader(path, (rows, 32, 32, 3))
        return Listing(self.variant.name, classes, splits, reader, left_out=archive.left_out())


class Cifar10(Cifar):
    """CIFAR-10."""

    usage, variant = "cifar10:PATH", cifar.CIFAR10


class Cifar100(Cifar):
    """CIFAR-100 with its fine labels."""

    usage, variant = "cifar100:PATH", cifar.CIFAR100
