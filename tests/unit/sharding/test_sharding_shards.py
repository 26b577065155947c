import dataclasses
import io
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sharding_support import encoded, flip, pixels, write_folder

import sharding.shards as shards_module
from sharding.errors import UserError
from sharding.manifest import Manifest
from sharding.options import Options
from sharding.shards import Shards, decode, verify_shard
from sharding.writer import build


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("source")
    return write_folder(root / "data", {"a": 30, "b": 20, "c": 10})


@pytest.fixture
def dest(source, tmp_path):
    build(f"folder:{source}", tmp_path / "dest", Options(test_fraction=0.2, shard_size=20_000, workers=1))
    return tmp_path / "dest"


def test_payloads_and_labels_are_those_of_the_tar(dest):
    manifest = Manifest.load(dest)
    for name, split in manifest.splits.items():
        shards = Shards(dest, manifest, name)
        expected, labels = [], []
        for info in split.shards:
            with tarfile.open(dest / info.file) as archive:
                members = {member.name: archive.extractfile(member).read() for member in archive}
            expected += [data for file, data in members.items() if not file.endswith(".cls")]
            labels += [int(data) for file, data in members.items() if file.endswith(".cls")]
        assert shards.samples == split.samples == len(expected)
        assert shards.shard_samples == tuple(info.samples for info in split.shards)
        assert [bytes(shards.payload(i)) for i in range(shards.samples)] == expected
        assert shards.labels.dtype == np.int64
        assert shards.labels.tolist() == labels


def test_every_sample_is_located_in_shard_and_row_order(dest):
    shards = Shards(dest, Manifest.load(dest), "train")
    assert len(shards.shard_samples) > 2
    expected = [(shard, row) for shard, count in enumerate(shards.shard_samples) for row in range(count)]
    assert [shards.locate(i) for i in range(shards.samples)] == expected
    for outside in (-1, shards.samples):
        with pytest.raises(IndexError):
            shards.locate(outside)
        with pytest.raises(IndexError):
            shards.payload(outside)


def test_more_shards_than_may_be_open_are_read_and_views_outlive_their_map(dest, monkeypatch):
    monkeypatch.setattr(shards_module, "OPEN_SHARDS", 1)
    shards = Shards(dest, Manifest.load(dest), "train")
    views = [shards.payload(i) for i in range(shards.samples)]
    again = Shards(dest, Manifest.load(dest), "train")
    assert all(view == again.payload(i) for i, view in enumerate(views))


def test_an_unknown_split_is_an_error(dest):
    with pytest.raises(UserError, match="has no split extra; it has train, val, test"):
        Shards(dest, Manifest.load(dest), "extra")


@pytest.mark.parametrize("change", [-1, 512])
def test_a_tar_of_another_size_is_named(dest, change):
    path = dest / "train/000001.tar"
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"\0" * change)
    with pytest.raises(UserError, match=r"train/000001\.tar holds \d+ bytes where the manifest says"):
        Shards(dest, Manifest.load(dest), "train")


def test_a_tar_truncated_after_it_was_opened_is_named(dest):
    shards = Shards(dest, Manifest.load(dest), "val")
    path = dest / "val/000000.tar"
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(UserError, match=r"val/000000\.tar"):
        shards.payload(0)


@pytest.mark.parametrize("file", ["train/000000.tar", "train/000000.npy"])
def test_a_missing_file_is_named(dest, file):
    (dest / file).unlink()
    with pytest.raises(UserError, match=file):
        Shards(dest, Manifest.load(dest), "train")


@pytest.mark.parametrize(
    ("row", "column", "value", "reason"),
    [
        (0, 0, -512, "points outside"),
        (1, 0, 2**62, "points outside"),
        (1, 1, 0, "points outside"),
        (2, 1, 2**63 - 1, "points outside"),
        (3, 2, 3, "label outside 0 … 2"),
        (3, 2, -1, "label outside 0 … 2"),
    ],
)
def test_an_index_that_points_outside_is_named(dest, row, column, value, reason):
    path = dest / "train/000000.npy"
    index = np.load(path)
    index[row, column] = value
    np.save(path, index)
    with pytest.raises(UserError, match=rf"train/000000\.npy .*{reason}"):
        Shards(dest, Manifest.load(dest), "train")


def test_an_index_of_other_labels_is_an_error(dest):
    path = dest / "train/000000.npy"
    index = np.load(path)
    index[:, 2] = 0
    np.save(path, index)
    with pytest.raises(UserError, match="do not match the manifest's class counts"):
        Shards(dest, Manifest.load(dest), "train")


@pytest.mark.parametrize("make", [lambda i: i[:-1], lambda i: i[:, :2], lambda i: i.astype(np.int32), lambda i: i.T])
def test_an_index_of_another_shape_or_type_is_named(dest, make):
    path = dest / "train/000000.npy"
    np.save(path, make(np.load(path)))
    with pytest.raises(UserError, match=r"train/000000\.npy does not hold"):
        Shards(dest, Manifest.load(dest), "train")


def test_pickled_and_zipped_indexes_are_refused(dest):
    path = dest / "train/000000.npy"
    np.save(path, np.array([{}], object))
    with pytest.raises(UserError, match="is not an index"):
        Shards(dest, Manifest.load(dest), "train")
    buffer = io.BytesIO()
    np.savez(buffer, index=np.zeros((1, 3), np.int64))
    path.write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match="is not an index"):
        Shards(dest, Manifest.load(dest), "train")


def test_any_flipped_byte_is_found_and_the_file_named(dest):
    manifest = Manifest.load(dest)
    info = manifest.splits["val"].shards[0]

    @settings(max_examples=60, deadline=None)
    @given(st.sampled_from([info.file, info.index_file]), st.integers(0, 10**6), st.integers(1, 255))
    def check(file, position, mask):
        verify_shard(dest, info)
        flip(dest / file, position, mask)
        try:
            with pytest.raises(UserError, match=file):
                verify_shard(dest, info)
            # Reading without a check of the sums may go well, or say what is wrong, but nothing else.
            try:
                Shards(dest, manifest, "val").payload(0)
            except UserError as error:
                assert "val" in str(error)  # noqa: PT017
        finally:
            flip(dest / file, position, mask)

    check()


def test_another_sum_in_the_manifest_is_found(dest):
    info = Manifest.load(dest).splits["train"].shards[0]
    with pytest.raises(UserError, match=r"train/000000\.tar was altered"):
        verify_shard(dest, dataclasses.replace(info, sha256="0" * 64))
    with pytest.raises(UserError, match=r"train/000000\.npy was altered"):
        verify_shard(dest, dataclasses.replace(info, index_sha256="0" * 64))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("wrap", [bytes, memoryview])
def test_decoding_agrees_with_pillow_and_checks_size_and_mode(kind, wrap):
    image = np.repeat(np.repeat(pixels(0, 2, 3), 8, 0), 8, 1)
    payload = wrap(encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {})))
    out = np.zeros((16, 24, 3), np.uint8)
    decode(payload, out)
    assert np.abs(out.astype(int) - image).mean() < (30 if kind == "JPEG" else 1e-9)
    for shape in ((24, 16, 3), (16, 24, 1), (16, 23, 3)):
        with pytest.raises(ValueError, match="is expected"):
            decode(payload, np.zeros(shape, np.uint8))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=64), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBPVP8 "]))
def test_decoding_rubbish_raises_value_error_alone(data, head):
    with pytest.raises(ValueError):
        decode(head + data, np.empty((8, 8, 3), np.uint8))
