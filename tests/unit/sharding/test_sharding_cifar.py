import os
import pickle
import pickletools
import struct
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sharding_support import contents, to_tar

from sharding.cifar import unpickle
from sharding.errors import UserError
from sharding.manifest import Manifest
from sharding.options import Options
from sharding.shards import Shards, decode
from sharding.writer import build

ROWS = 20


def published(protocol: int, keys: type = bytes) -> dict[str, bytes]:
    """A small CIFAR-10 archive: pickles as python 2 wrote them (protocol 2), with numpy's old module name."""
    random = np.random.default_rng(0)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]

    def key(text: str) -> object:
        return text.encode() if keys is bytes else text

    files = {}
    for name in names:
        data = random.integers(0, 256, (ROWS, 3072), np.uint8)
        labels = [i % 10 for i in range(ROWS)]
        content = {key("data"): data, key("labels"): labels, key("batch_label"): key(name)}
        files[name] = pickle.dumps(content, protocol)
    files["batches.meta"] = pickle.dumps({key("label_names"): [f"class {i}" for i in range(10)]}, protocol)
    return {name: data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray") for name, data in files.items()}


def write(files: dict[str, bytes], folder):
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("kind", ["folder", "tar", "tar.gz"])
def test_the_published_archive_is_read_pixel_by_pixel(tmp_path, kind):
    files = published(2)
    path = write(files, tmp_path / "cifar-10-batches-py")
    if kind != "folder":
        path = to_tar(path, tmp_path / f"a.{kind}", mode="w:gz" if kind == "tar.gz" else "w")
    dest = tmp_path / "dest"
    manifest = build(f"cifar10:{path}", dest, Options(workers=1)).manifest
    assert manifest.name == "cifar10"
    assert manifest.classes == tuple(f"class {i}" for i in range(10))
    assert (manifest.height, manifest.width, manifest.channels) == (32, 32, 3)
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 90, "val": 10, "test": ROWS}
    shards = Shards(dest, manifest, "test")
    batch = pickle.loads(files["test_batch"])
    expected = {(data.tobytes(), label) for data, label in zip(batch[b"data"], batch[b"labels"], strict=True)}
    found = set()
    for i in range(ROWS):
        out = np.empty((32, 32, 3), np.uint8)
        decode(shards.payload(i), out)
        found.add((out.transpose(2, 0, 1).tobytes(), int(shards.labels[i])))
    assert found == expected
    assert {path.name for path in dest.iterdir()} == {"manifest.json", "build.json", "train", "val", "test"}


def python_2_batch(data: np.ndarray, labels: list[int]) -> bytes:
    """The opcodes that python 2 wrote: byte strings (T, U), not bytes through _codecs; dtype flags as numbers."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        + b"(K\x01(J"
        + struct.pack("<i", data.shape[0])
        + b"J"
        + struct.pack("<i", data.shape[1])
        + b"tcnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + struct.pack("<i", data.nbytes)
        + data.tobytes()
        + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + numbers + b"u."


@pytest.mark.filterwarnings("error")
def test_pickles_of_python_2_and_3_and_of_any_numpy_give_the_same_shards(tmp_path):
    old = published(2)
    new = {name: pickle.dumps(pickle.loads(data), 2) for name, data in published(2, str).items()}
    assert any(b"numpy._core" in data for data in new.values())
    oldest = dict(old)
    for name in set(old) - {"batches.meta"}:
        content = pickle.loads(old[name])
        oldest[name] = python_2_batch(content[b"data"], content[b"labels"])
    outcomes = []
    for name, files in (("old", old), ("new", new), ("oldest", oldest)):
        build(f"cifar10:{write(files, tmp_path / name)}", tmp_path / f"{name}-out", Options(workers=1))
        outcomes.append(contents(tmp_path / f"{name}-out"))
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_cifar100_uses_the_fine_labels(tmp_path):
    random = np.random.default_rng(0)
    files = {"meta": pickle.dumps({b"fine_label_names": ["x", "y"], b"coarse_label_names": ["z"]}, 2)}
    for name in ("train", "test"):
        data = random.integers(0, 256, (8, 3072), np.uint8)
        content = {b"data": data, b"fine_labels": [0, 1] * 4, b"coarse_labels": [0] * 8}
        files[name] = pickle.dumps(content, 2)
    manifest = build(f"cifar100:{write(files, tmp_path / 'c')}", tmp_path / "d", Options(workers=1)).manifest
    assert (manifest.name, manifest.classes) == ("cifar100", ("x", "y"))
    assert manifest.splits["test"].class_counts == (4, 4)


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("evil", "name"),
    [
        (Evil(os.system, "touch hacked"), "system"),
        (Evil(eval, "1"), "eval"),
        (Evil(getattr, "a", "upper"), "getattr"),
        (Evil(np.load, "x"), "numpy"),
        (Evil(__import__("_codecs").encode, "x", "zlib"), "codec zlib"),
        (Evil(__import__("_codecs").decode, b"x", "zlib"), "_codecs.decode"),
    ],
)
def test_a_pickle_that_asks_for_anything_else_is_refused(tmp_path, monkeypatch, evil, name):
    monkeypatch.chdir(tmp_path)
    files = published(2)
    files["data_batch_3"] = pickle.dumps({b"data": evil}, 2)
    with pytest.raises(UserError, match=rf"data_batch_3 in .* is malformed .*{name}.* is not allowed"):
        build(f"cifar10:{write(files, tmp_path / 'c')}", tmp_path / "d", Options(workers=1))
    assert not (tmp_path / "hacked").exists()
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    "body", [b"r\xff\xff\xff\x7f", b"\x96" + b"\xff" * 7 + b"\x0f", b"\x8e" + b"\xff" * 7 + b"\x0f", b"\x97"]
)
def test_a_pickle_that_would_fill_the_memory_is_refused(body):
    with pytest.raises((pickle.UnpicklingError, ValueError)):
        unpickle(b"\x80\x05N" + body + b".")


def test_what_published_pickles_ask_for_is_allowed():
    asked = set()
    for data in published(2).values():
        strings = []
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "GLOBAL":
                asked.add(argument)
            strings.append(argument)
    assert asked >= {"numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype", "_codecs encode"}


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        {b"data": np.zeros((20, 3072), np.int32), b"labels": [0] * 20},
        {b"data": np.zeros((20, 3071), np.uint8), b"labels": [0] * 20},
        {b"data": np.zeros((20, 3072), np.uint8), b"labels": [0] * 19},
        {b"data": np.zeros((20, 3072), np.uint8), b"labels": [10] * 20},
        {b"data": np.zeros((20, 3072), np.uint8), b"labels": ["0"] * 20},
    ],
)
def test_a_malformed_file_is_named(tmp_path, content):
    files = published(2)
    files["test_batch"] = pickle.dumps(content, 2)
    with pytest.raises(UserError, match=r"test_batch in .* is malformed"):
        build(f"cifar10:{write(files, tmp_path / 'c')}", tmp_path / "d", Options(workers=1))


def test_a_missing_file_is_named(tmp_path):
    files = published(2)
    del files["data_batch_4"]
    with pytest.raises(UserError, match="lacks data_batch_4"):
        build(f"cifar10:{write(files, tmp_path / 'c')}", tmp_path / "d", Options(workers=1))
    with pytest.raises(UserError, match="holds no file train"):
        build(f"cifar100:{tmp_path / 'c'}", tmp_path / "d", Options(workers=1))


def test_a_truncated_archive_is_named(tmp_path):
    path = to_tar(write(published(2), tmp_path / "c"), tmp_path / "a.tar.gz", mode="w:gz")
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"a\.tar\.gz is damaged"):
        build(f"cifar10:{path}", tmp_path / "d", Options(workers=1))
    assert not (tmp_path / "d").exists()
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(UserError, match="holds no file data_batch_1"):
        build(f"cifar10:{tmp_path / 'empty.tar'}", tmp_path / "d", Options(workers=1))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_pickles_run_nothing_and_raise_an_exception_or_give_plain_values(data):
    pickled = bytearray(pickle.dumps({b"data": np.zeros((2, 4), np.uint8), b"labels": [0, 1]}, 2))
    for _ in range(data.draw(st.integers(1, 3))):
        pickled[data.draw(st.integers(0, len(pickled) - 1))] = data.draw(st.integers(0, 255))
    try:
        value = unpickle(bytes(pickled))
    except Exception:
        return
    assert not callable(value) or value.__module__ == "sharding.cifar"


def test_name_of_the_manifest_is_that_of_the_source(tmp_path):
    build("digits", tmp_path / "whatever", Options(workers=1))
    assert Manifest.load(tmp_path / "whatever").name == "digits"
