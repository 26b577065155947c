"""A damaged file is found, named, and never trained on; nothing is overwritten (design 5.6)."""

import functools
import hashlib
import shutil
from pathlib import Path

import hooks
import pytest
import ranks

from sharding.options import Options
from sharding.writer import build


def flip(path: Path) -> Path:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)
    return path


def truncate(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-100])
    return path


def remove(path: Path) -> Path:
    path.unlink()
    return path


def content(*roots: Path) -> dict[Path, str]:
    """Hash of every file of a data set, and of every finished step."""
    files = [p for root in roots for p in root.rglob("*") if p.is_file() and "tensorboard" not in p.parts]
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.parent != roots[0]}


@pytest.fixture
def run(undisturbed, digits, tmp_path):
    """(out, data, argv): a finished run of its own on data of its own, with the fingerprints of `undisturbed`."""
    data = shutil.copytree(digits, tmp_path / "data")
    out = undisturbed.copy(tmp_path / "out", "teachers", "logits", "gaussian", "gan", "matching")
    return out, data, [*undisturbed.argv, "--data", str(data)]


def step(out: Path, name: str) -> Path:
    return next(p for p in (out / name).iterdir() if len(p.name) == 16)


DAMAGES = {
    "a byte of a shard": lambda out, data: flip(data / "train" / "000001.tar"),
    "a byte of an index": lambda out, data: flip(data / "train" / "000001.npy"),
    "a byte of a test shard": lambda out, data: flip(data / "test" / "000000.tar"),
    "a truncated shard": lambda out, data: truncate(data / "train" / "000002.tar"),
    "a missing shard": lambda out, data: remove(data / "val" / "000000.tar"),
    "a byte of a logit file": lambda out, data: flip(step(out, "logits") / "teacher-001" / "train-000001.npy"),
    "a truncated logit file": lambda out, data: truncate(step(out, "logits") / "teacher-000" / "train-000000.npy"),
    "a missing logit file": lambda out, data: remove(step(out, "logits") / "teacher-003" / "train-000000.npy"),
    "a byte of the class means": lambda out, data: flip(step(out, "logits") / "class-means.npy"),
    "a byte of a teacher": lambda out, data: flip(step(out, "teachers") / "teacher-002.safetensors"),
    "a truncated teacher": lambda out, data: truncate(step(out, "teachers") / "teacher-002.safetensors"),
    "a byte of a generator": lambda out, data: flip(step(out, "gan") / "generator.safetensors"),
    "a byte of a discriminator": lambda out, data: flip(step(out, "gan") / "discriminator-state.pt"),
    "a truncated list": lambda out, data: truncate(step(out, "gan") / "contents.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_in_one_line_and_nothing_is_overwritten(run, damage):
    out, data, argv = run
    path = DAMAGES[damage](out, data)
    before = content(out, data)
    assert str(path) in ranks.refused(out, argv)
    assert content(out, data) == before


@pytest.mark.parametrize("damage", ["a byte of a shard", "a truncated logit file"])
def test_two_ranks_share_the_work_and_the_one_that_finds_it_says_so(run, damage):
    out, data, argv = run
    path = DAMAGES[damage](out, data)
    before = content(out, data)
    assert str(path) in ranks.refused(out, argv, 2)
    assert content(out, data) == before


def test_the_manifest_of_another_data_set_is_refused(run, tmp_path):
    out, data, argv = run
    other = tmp_path / "other"
    build("digits", other, Options(shard_size=400_000, workers=1, seed=1))
    shutil.copy(other / "manifest.json", data)
    before = content(out, data)
    assert f"{data}/" in ranks.refused(out, argv)
    assert content(out, data) == before


@pytest.mark.parametrize("text", ["", "{}", '{"format": "gdd-shards/1"}', "[1]"])
def test_a_damaged_manifest_is_named(run, text):
    out, data, argv = run
    (data / "manifest.json").write_text(text)
    assert str(data / "manifest.json") in ranks.refused(out, argv)


@pytest.mark.parametrize("damage", ["a truncated shard", "a truncated logit file", "a truncated teacher"])
def test_without_hashing_what_cannot_be_read_is_still_named(run, damage):
    """--no-verify: no false byte is looked for, but a file that is no longer one is found where it is read."""
    out, data, argv = run
    shutil.rmtree(step(out, "matching"))
    path = DAMAGES[damage](out, data)
    assert str(path) in ranks.refused(out, [*argv, "--no-verify"])


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(undisturbed, tmp_path):
    out = undisturbed.copy(tmp_path / "out", "teachers", "logits")
    argv = [*undisturbed.argv, "--until", "gan"]
    ended = ranks.start(out, argv, before=functools.partial(hooks.die_in_gan, victim=0, step=8)).wait()
    assert ended.codes == [-9]
    newest = max(next((out / "gan").glob("*.partial")).glob("checkpoints/step-*.pt"))
    flip(newest)
    ended = ranks.start(out, argv).wait()
    assert ended.codes == [0], ended.text
    assert f"checkpoint skipped: {newest} is damaged" in ended.err[0]
    assert ranks.steps(out)["gan"]["status"] == "resumed"
