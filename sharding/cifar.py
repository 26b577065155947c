"""The published CIFAR-10 and CIFAR-100 python archives, read without executing code that a pickle may contain."""

import io
import pickle
import pickletools
import posixpath
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sharding.errors import UserError
from sharding.layout import Tree

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Variant:
    """File names and dictionary keys of one published archive."""

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    labels: str
    names: str


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
CIFAR10 = Variant("cifar10", _BATCHES, ("test_batch",), "batches.meta", "labels", "label_names")
CIFAR100 = Variant("cifar100", ("train",), ("test",), "meta", "fine_labels", "fine_label_names")


class Archive:
    """A CIFAR archive, read one file at a time. Raises UserError naming what is missing or malformed."""

    def __init__(self, tree: Tree, variant: Variant) -> None:
        self._tree, self._variant = tree, variant
        folder = tree.folder_with(variant.train[0])
        if folder is None:
            cure = f"give the published python archive of {variant.name}"
            raise UserError(f"{tree.files.shown} holds no file {variant.train[0]}; {cure}")
        self._folder = folder

    def classes(self) -> tuple[str, ...]:
        """Return the class names in the order of their ids."""
        names = self._load(self._variant.meta).get(self._variant.names)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise self._malformed(self._variant.meta, f"it holds no list {self._variant.names}")
        return tuple(names)

    def batch(self, file: str, classes: int) -> tuple[NDArray[np.uint8], list[int]]:
        """Return one file: pixels [N, 32, 32, 3] and N labels."""
        content = self._load(file)
        pixels, labels = content.get("data"), content.get(self._variant.labels)
        pixels = pixels.values if isinstance(pixels, PickledArray) else None
        if pixels is None or pixels.ndim != 2:
            raise self._malformed(file, "data is not an array of bytes")
        if pixels.shape[1] != PIXELS or not isinstance(labels, list) or len(labels) != len(pixels):
            raise self._malformed(file, f"it does not hold N rows of {PIXELS} bytes and N {self._variant.labels}")
        if not all(isinstance(label, int) and 0 <= label < classes for label in labels):
            raise self._malformed(file, f"a label is outside 0 … {classes - 1}")
        return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels

    def left_out(self) -> dict[str, int]:
        """Return how many files of each kind do not belong to the archive."""
        files = (*self._variant.train, *self._variant.test, self._variant.meta)
        return self._tree.left_out({posixpath.join(self._folder, file) for file in files})

    def _load(self, file: str) -> dict[str, Any]:
        member = self._tree.find(posixpath.join(self._folder, file))
        if member is None:
            raise UserError(f"{self._tree.files.shown} lacks {file}; download the archive again")
        try:
            content = unpickle(self._tree.files.read(member))
        # A damaged pickle can raise nearly anything, MemoryError and IndexError included.
        except Exception as error:
            raise self._malformed(file, str(error) or type(error).__name__) from None
        if not isinstance(content, dict):
            raise self._malformed(file, "it is not a dictionary")
        return {key if isinstance(key, str) else bytes(key).decode("latin1"): value for key, value in content.items()}

    def _malformed(self, file: str, reason: str) -> UserError:
        return UserError(f"{file} in {self._tree.files.shown} is malformed ({reason}); download the archive again")


def unpickle(data: bytes) -> Any:
    """Read a pickle of arrays of bytes and plain containers; byte strings of python 2 are returned as text.

    Raises pickle.UnpicklingError for content that is not allowed, and almost any exception for damaged data.
    """
    for opcode, argument, _ in pickletools.genops(data):
        # Some opcodes allocate as much memory as a number in the file says.
        greedy = opcode.name == "LONG_BINPUT" and (argument or 0) > len(data)
        if opcode.name not in _OPCODES or greedy:
            raise pickle.UnpicklingError(f"it uses the opcode {opcode.name}, which is not allowed")
    return _Unpickler(io.BytesIO(data), encoding="latin1").load()


class _Unpickler(pickle.Unpickler):
    """Unpickles arrays of bytes and plain containers. Raises pickle.UnpicklingError for any other global name.

    The four allowed names lead to stand-ins, because numpy's own functions can crash on a state that numpy did not write.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed")
        return _ALLOWED[module, name]


class PickledArray:
    """Stands for numpy.ndarray. After the state is set, `values` is a uint8 array of the pickled shape."""

    values: NDArray[np.uint8] | None = None

    def __setstate__(self, state: Any) -> None:
        """Take (version, shape, dtype, Fortran order, content)."""
        _, shape, dtype, fortran, content = state
        if not isinstance(dtype, PickledDtype) or dtype.description != "u1":
            raise pickle.UnpicklingError("it holds an array of something other than bytes")
        # Python 2 wrote byte strings, which are read as latin1 text.
        data = content.encode("latin1") if isinstance(content, str) else bytes(content)
        self.values = np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")


class PickledDtype:
    """Stands for numpy.dtype. Its state gives the byte order, which has no meaning for bytes."""

    def __init__(self, description: str, *_: Any) -> None:
        self.description = description

    def __setstate__(self, state: Any) -> None:
        """Ignore the state."""


def _encode(text: str, encoding: str) -> bytes:
    """Replace _codecs.encode, which can call any codec; pickles of protocol 2 use it with latin1 to store bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it asks for the codec {encoding}, which is not allowed")
    return text.encode("latin1")


# What python 2 and 3 write, at protocols 2 to 4, for dictionaries of numbers, text, lists and arrays.
_OPCODE_NAMES = """
PROTO FRAME STOP MARK EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM SETITEMS
BININT BININT1 BININT2 LONG1 NONE NEWTRUE NEWFALSE BINUNICODE SHORT_BINUNICODE BINSTRING SHORT_BINSTRING
BINBYTES SHORT_BINBYTES GLOBAL STACK_GLOBAL REDUCE BUILD BINPUT LONG_BINPUT BINGET LONG_BINGET MEMOIZE
"""
_OPCODES = frozenset(_OPCODE_NAMES.split())
_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: PickledArray(),
    ("numpy._core.multiarray", "_reconstruct"): lambda *_: PickledArray(),
    ("numpy", "ndarray"): PickledArray,
    ("numpy", "dtype"): PickledDtype,
    ("_codecs", "encode"): _encode,
}
