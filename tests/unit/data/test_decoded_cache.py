"""Decoded images that are kept: built once, whole, verified, given up where there is no room."""

import hashlib
import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch

from gdd_dist.data import decoded_cache
from gdd_dist.data.images import Images
from sharding import shards
from sharding.errors import UserError
from sharding.manifest import Manifest


@pytest.fixture(scope="module")
def manifest(digits):
    return Manifest.load(digits)


def opened(digits, manifest, cache, how="ram", threads=2):
    return Images(digits, manifest, "train", threads=threads, resident=how, cache=cache)


def test_the_file_holds_every_image_in_order_and_its_checksum(digits, manifest, tmp_path):
    streamed = opened(digits, manifest, None, "none").read(np.arange(1197))
    kept = opened(digits, manifest, tmp_path).read(np.arange(1197))
    assert torch.equal(kept, streamed)
    ((path, size, sha256, directory),) = decoded_cache.decoded_files(tmp_path, manifest, ("train", "val"))
    assert path.read_bytes() == streamed.permute(0, 2, 3, 1).contiguous().numpy().tobytes()
    assert (path.parent, size) == (directory, 1197 * 256)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def test_images_are_decoded_once_and_never_again(digits, manifest, tmp_path, monkeypatch):
    expected = opened(digits, manifest, tmp_path).read(np.arange(1197)).clone()

    def refuse(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr("gdd_dist.data.images.decode", refuse)
    for how in ("ram", "auto", "device"):
        assert torch.equal(opened(digits, manifest, tmp_path, how).read(np.arange(1197)), expected)


def _read(rank: int, digits: Path, cache: Path) -> int:
    manifest, decoded = Manifest.load(digits), 0
    inner = shards.decode

    def decode(*args):
        nonlocal decoded
        decoded += 1
        inner(*args)

    from gdd_dist.data import images

    images.decode = decode
    Images(digits, manifest, "train", resident="ram", cache=cache).read(np.arange(100))
    return decoded


def test_one_process_of_several_decodes_and_the_others_wait_for_it(digits, tmp_path):
    decoded = ranks.call(tmp_path / "job", 4, _read, digits, tmp_path / "cache")
    assert sorted(decoded) == [0, 0, 0, 1197]


def _die(digits: Path, cache: Path) -> None:
    import os

    from gdd_dist.data import images

    images.decode = lambda *_: os._exit(9)
    opened(digits, Manifest.load(digits), cache, threads=1).read(np.arange(3))


def test_of_a_hosts_ranks_one_at_a_time_asks_for_the_lock(manifest, tmp_path, monkeypatch):
    asked, inside, most = [0], [0], [0]

    @contextmanager
    def holding(*_):
        asked[0], inside[0] = asked[0] + 1, inside[0] + 1
        most[0] = max(most[0], inside[0])
        yield
        inside[0] -= 1

    def build(self, _fill, samples):
        time.sleep(0.5)
        self.path.write_bytes(bytes(samples * 256))
        self._note.write_text("{}")

    monkeypatch.setattr(decoded_cache, "holding", holding)
    monkeypatch.setattr(decoded_cache.Decoded, "_build", build)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: decoded_cache.Decoded(tmp_path, manifest, "train").open(None, 1197), range(6)))
    assert [f.shape for f in found] == [(1197, 16, 16, 1)] * 6
    assert (asked[0], most[0]) == (1, 1)


def test_a_build_that_was_killed_is_built_anew(digits, manifest, tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=_die, args=(digits, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert not decoded_cache.decoded_files(tmp_path, manifest, ("train",))
    expected = opened(digits, manifest, None, "none").read(np.arange(1197))
    assert torch.equal(opened(digits, manifest, tmp_path).read(np.arange(1197)), expected)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["images.json", "images.u8"]


def test_a_file_of_another_size_is_named_and_not_read(digits, manifest, tmp_path):
    opened(digits, manifest, tmp_path).read(np.arange(3))
    ((path, *_),) = decoded_cache.decoded_files(tmp_path, manifest, ("train",))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"images\.u8 has 306431 bytes instead of 306432; remove"):
        opened(digits, manifest, tmp_path).read(np.arange(3))


def test_a_run_finds_an_altered_file_before_it_reads_any(tiny, digits, manifest, tmp_path):
    out = tmp_path / "out"
    opened(digits, manifest, out / "cache").read(np.arange(3))
    ((path, *_),) = decoded_cache.decoded_files(out / "cache", manifest, ("train",))
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    assert "images.u8 is damaged" in ranks.refused(out, [*tiny, "--until", "teachers"], 2)
    assert not list((out / "teachers").glob("*"))


def test_without_room_auto_streams_and_says_why(digits, manifest, tmp_path, monkeypatch, capsys):
    def full(*_args, **_kw):
        raise OSError(28, "No space left on device")

    expected = opened(digits, manifest, None, "none").read(np.arange(50))
    monkeypatch.setattr(decoded_cache, "atomic_file", full)
    images = opened(digits, manifest, tmp_path, "auto")
    assert torch.equal(images.read(np.arange(50)), expected)
    assert torch.equal(images.read(np.arange(50)), expected)
    assert capsys.readouterr().err.count("No space left on device") == 1
    with pytest.raises(OSError, match="No space"):
        opened(digits, manifest, tmp_path, "ram").read(np.arange(50))


@pytest.mark.parametrize(
    ("memory", "disk", "there", "expected"),
    [(400, 200, False, "ram"), (399, 200, False, "none"), (400, 199, False, "none"), (0, 0, True, "ram")],
)
def test_auto_keeps_what_takes_its_share_of_memory_and_disk(tmp_path, monkeypatch, memory, disk, there, expected):
    monkeypatch.setattr(decoded_cache, "free_memory", lambda: memory)
    monkeypatch.setattr(decoded_cache, "_disk", lambda _: disk)
    cpu = torch.device("cpu")
    assert decoded_cache.fits("auto", 100, tmp_path, cpu, there) == expected
    assert (
        decoded_cache.fits("ram", 100, tmp_path, cpu, there)
        == decoded_cache.fits("device", 100, tmp_path, cpu, there)
        == "ram"
    )
    assert decoded_cache.fits("none", 100, tmp_path, cpu, there) == "none"


def test_another_decoder_or_other_data_is_another_file(manifest, monkeypatch):
    here = decoded_cache.key(manifest)
    monkeypatch.setattr(decoded_cache, "version", lambda _: "0")
    assert decoded_cache.key(manifest) != here
