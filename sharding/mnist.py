"""MNIST and Fashion-MNIST in their published files."""

import gzip
import io
import posixpath
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sharding.archives import open_files
from sharding.arrays import ArrayReader
from sharding.containers import LARGEST_FILE, Files
from sharding.errors import UserError
from sharding.layout import Tree
from sharding.links import Member
from sharding.listing import PIXELS, Listing, Sample, Source

DIGITS = tuple("0123456789")
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


class Mnist(Source):
    """The four idx files, compressed or not, in a directory or an archive."""

    usage = "mnist:PATH"

    def listing(self) -> Listing:
        """List the images; they are written once into an array in `scratch` that all workers map."""
        files, splits, used = open_files(self.argument, self.scratch), dict[str, list[Sample]](), set[str]()
        tree, path, rows = Tree(files), self.scratch / PIXELS, 0
        shapes = set[tuple[int, ...]]()
        with path.open("wb") as stream:
            for split, prefix in (("train", "train"), ("test", "t10k")):
                images = _array(files, tree, f"{prefix}-images-idx3-ubyte", used)
                labels = _array(files, tree, f"{prefix}-labels-idx1-ubyte", used)
                shapes.add(images.shape[1:])
                if len(images) != len(labels) or not len(labels) or len(shapes) > 1:
                    raise UserError(f"the {prefix} files in {files.shown} do not match each other; download them again")
                if labels.max() >= len(DIGITS):
                    found = f"the {prefix} labels in {files.shown} are {labels.min()} … {labels.max()}, not 0 … 9"
                    raise UserError(f"{found}; write such a set as files, PATH/CLASS/IMAGE, and give folder:PATH")
                stream.write(images.data)
                members = (Member(f"{prefix}[{i}]", images[0].size, offset=rows + i) for i in range(len(labels)))
                splits[split] = list(map(Sample, members, labels.tolist()))
                rows += len(labels)
        height, width = shapes.pop()
        reader = ArrayReader(path, (rows, height, width, 1))
        classes, note = DIGITS, "class names are those of MNIST, because PATH does not contain the word fashion"
        if "fashion" in str(Path(self.argument).absolute()).lower():
            classes, note = FASHION, "class names are those of Fashion-MNIST, because PATH contains the word fashion"
        return Listing("mnist", classes, splits, reader, left_out=tree.left_out(used), notes=(note,))


def _array(files: Files, tree: Tree, name: str, used: set[str]) -> NDArray[np.uint8]:
    """The array of an idx file, uint8 [N] or [N, height, width]. Raises UserError where it is missing or malformed."""
    spellings = [base + end for base in (name, name.replace("-idx", ".idx")) for end in ("", ".gz")]
    found = ((tree.folder_with(file), file) for file in spellings)
    member = next((tree.find(posixpath.join(folder, file)) for folder, file in found if folder is not None), None)
    if member is None:
        raise UserError(f"{files.shown} holds no {name} or {name}.gz; give the four published files of MNIST")
    used.add(member.name)
    try:
        content = files.read(member)
        if content[:2] == b"\x1f\x8b":
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(LARGEST_FILE)
        axes = int(name[-7])
        shape = tuple(np.frombuffer(content, ">u4", axes, 4).tolist())
        if content[:4] != bytes((0, 0, 8, axes)):
            raise ValueError("it is not an idx file of bytes")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise UserError(f"{member.name} in {files.shown} is malformed ({error}); download it again") from None
