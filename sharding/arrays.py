"""Sources whose samples are pixels, not encoded files: digits, cifar10, cifar100, mnist."""

import gzip
import io
import posixpath
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sharding.cifar import Archive, Variant
from sharding.containers import LARGEST_FILE, open_files
from sharding.errors import UserError
from sharding.layout import Tree
from sharding.links import Member
from sharding.listing import PIXELS, Listing, Sample
from sharding.options import Options
from sharding.splits import stratified

DIGITS = tuple("0123456789")
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
DIGITS_TEST, DIGITS_VAL = 360, 240


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


def digits(argument: str, scratch: Path, _: Options) -> Listing:
    """List scikit-learn's bundled handwritten digits: 1,797 images of 8×8, here 16×16 bilinear, one channel.

    Test is stratified with seed 0 whatever the build's seed. Raises UserError for an argument.
    """
    if argument:
        raise UserError("digits takes no path; write digits alone")
    import sklearn
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = np.stack([_enlarge(image.reshape(8, 8)) for image in images])
    path = scratch / PIXELS
    pixels.tofile(path)
    test = stratified(labels, DIGITS_TEST, seed=0, purpose="test")
    splits: dict[str, list[Sample]] = {"train": [], "test": []}
    for i, (label, in_test) in enumerate(zip(labels.astype(int).tolist(), test, strict=True)):
        splits["test" if in_test else "train"].append(Sample(Member(f"digit {i}", 16 * 16, offset=i), label))
    versions = {"scikit-learn": sklearn.__version__}
    return Listing("digits", DIGITS, splits, ArrayReader(path, pixels.shape), DIGITS_VAL, versions)


def _enlarge(image: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return uint8 [16, 16, 1] in 0 … 255 from [8, 8] in 0 … 16."""
    large = Image.fromarray((image * (255 / 16)).astype(np.float32)).resize((16, 16), Image.Resampling.BILINEAR)
    return np.rint(np.asarray(large)).clip(0, 255).astype(np.uint8)[:, :, None]


def cifar(variant: Variant, argument: str, scratch: Path, _: Options) -> Listing:
    """List a published CIFAR python archive or its directory; of CIFAR-100 the fine labels."""
    archive = Archive(Tree(open_files(argument, scratch)), variant)
    classes = archive.classes()
    batches = (
        (split, file, *archive.batch(file, len(classes)))
        for split, files in (("train", variant.train), ("test", variant.test))
        for file in files
    )
    splits, reader = _written(scratch / PIXELS, batches)
    return Listing(variant.name, classes, splits, reader, left_out=archive.left_out())


def mnist(argument: str, scratch: Path, _: Options) -> Listing:
    """List MNIST or Fashion-MNIST in its four idx files, compressed or not, in a directory or an archive."""
    tree, used = Tree(open_files(argument, scratch)), set[str]()
    splits, reader = _written(scratch / PIXELS, _idx_pairs(tree, used))
    classes, note = DIGITS, "class names are those of MNIST, because PATH does not contain the word fashion"
    if "fashion" in str(Path(argument).absolute()).lower():
        classes, note = FASHION, "class names are those of Fashion-MNIST, because PATH contains the word fashion"
    return Listing("mnist", classes, splits, reader, left_out=tree.left_out(used), notes=(note,))


Batch = tuple[str, str, NDArray[np.uint8], Sequence[int]]
"""Split, name in messages, pixels [N, H, W, C], N labels."""


def _written(path: Path, batches: Iterable[Batch]) -> tuple[dict[str, list[Sample]], ArrayReader]:
    """Write the pixels of all batches into one file, which all workers map; return the samples by split, and a reader."""
    splits: dict[str, list[Sample]] = {"train": [], "test": []}
    rows = 0
    with path.open("wb") as stream:
        for split, name, pixels, labels in batches:
            stream.write(np.ascontiguousarray(pixels).data)
            members = (Member(f"{name}[{i}]", pixels[0].size, offset=rows + i) for i in range(len(labels)))
            splits[split] += map(Sample, members, labels)
            rows += len(labels)
    return splits, ArrayReader(path, (rows, *pixels.shape[1:]))


def _idx_pairs(tree: Tree, used: set[str]) -> Iterator[Batch]:
    """Yield train and test. Raises UserError for images and labels that do not fit each other, or labels above 9."""
    shapes = set[tuple[int, ...]]()
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = _array(tree, f"{prefix}-images-idx3-ubyte", used)
        labels = _array(tree, f"{prefix}-labels-idx1-ubyte", used)
        shapes.add(images.shape[1:])
        if len(images) != len(labels) or not len(labels) or len(shapes) > 1:
            raise UserError(f"the {prefix} files in {tree.files.shown} do not match each other; download them again")
        if labels.max() >= len(DIGITS):
            found = f"the {prefix} labels in {tree.files.shown} are {labels.min()} … {labels.max()}, not 0 … 9"
            raise UserError(f"{found}; write such a set as files, PATH/CLASS/IMAGE, and give folder:PATH")
        yield split, prefix, images[..., None], labels.tolist()


def _array(tree: Tree, name: str, used: set[str]) -> NDArray[np.uint8]:
    """The array of an idx file, uint8 [N] or [N, height, width]. Raises UserError where it is missing or malformed."""
    spellings = [base + end for base in (name, name.replace("-idx", ".idx")) for end in ("", ".gz")]
    found = ((tree.folder_with(file), file) for file in spellings)
    member = next((tree.find(posixpath.join(folder, file)) for folder, file in found if folder is not None), None)
    if member is None:
        raise UserError(f"{tree.files.shown} holds no {name} or {name}.gz; give the four published files of MNIST")
    used.add(member.name)
    try:
        content = tree.files.read(member)
        if content[:2] == b"\x1f\x8b":
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(LARGEST_FILE)
        axes = int(name[-7])
        shape = tuple(np.frombuffer(content, ">u4", axes, 4).tolist())
        if content[:4] != bytes((0, 0, 8, axes)):
            raise ValueError("it is not an idx file of bytes")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise UserError(f"{member.name} in {tree.files.shown} is malformed ({error}); download it again") from None
