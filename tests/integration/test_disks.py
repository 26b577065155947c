"""Hosts without a shared disk, as ranks that work in folders of their own: finished files travel, checked, and a resume is exact."""

import functools
import os
import shutil
from types import SimpleNamespace

import hooks
import pytest
import ranks

import gdd_dist.runtime.file_exchange
from gdd_dist.runtime.file_exchange import Disks
from gdd_dist.runtime.world import World
from gdd_dist.storage.store import clean
from sharding.errors import UserError


def on_host(rank, folder, then=None):
    """Rank r of 2 is host r alone, in FOLDER/host-r."""
    home = folder / f"host-{rank}"
    home.mkdir(exist_ok=True)
    os.chdir(home)
    os.environ["LOCAL_RANK"] = "0"
    if then is not None:
        then(rank)


def files(directory, *suffixes):
    return {p.name: ranks.weights(p) for p in sorted(directory.rglob("*")) if p.suffix in suffixes}


def test_two_disks_end_with_the_files_of_one(undisturbed, tmp_path):
    """Killed once on its way; each step of both hosts is whole, and has the numbers of a shared disk."""
    argv = [*undisturbed.argv, "--store", "store", "--out", "out"]
    kill = functools.partial(hooks.die_in_gan, victim=1, step=5)
    ended = ranks.start(
        tmp_path / "a", argv + ["--out", "out"], 2, before=functools.partial(on_host, folder=tmp_path, then=kill)
    )
    assert -9 in ended.wait_as_torchrun().codes
    job = ranks.start(tmp_path / "a", argv + ["--out", "out"], 2, before=functools.partial(on_host, folder=tmp_path))
    found = job.wait()
    assert found.codes == [0, 0], found.text
    assert "cannot see" in found.err[0]
    for step in ("teachers", "logits", "gaussian", "gan", "matching"):
        fp = undisturbed.steps[step]["fingerprint"]
        here, there = (tmp_path / f"host-{r}" / "store" / step / fp for r in (0, 1))
        assert files(here, ".safetensors", ".npy", ".pt", ".json") == files(
            there, ".safetensors", ".npy", ".pt", ".json"
        )
        assert files(here, ".safetensors", ".npy")
    for step in ("teachers", "logits"):
        fp = undisturbed.steps[step]["fingerprint"]
        expected = files(undisturbed.out / step / fp, ".safetensors", ".npy")
        assert files(tmp_path / "host-1" / "store" / step / fp, ".safetensors", ".npy") == expected


@pytest.mark.slow
def test_the_report_of_two_disks_has_the_numbers_of_one(reported, tmp_path):
    for r in (0, 1):
        reported.copy(tmp_path / f"host-{r}" / "store", "teachers", "logits", "gaussian", "gan", "matching")
    argv = [*reported.argv, "--store", "store", "--out", "out"]
    for _ in range(2):  # the second time from what the first left
        found = ranks.start(tmp_path / "a", argv, 2, before=functools.partial(on_host, folder=tmp_path)).wait()
        assert found.codes == [0, 0], found.text
        shutil.rmtree(tmp_path / "host-0" / "store" / "report" / reported.steps["report"]["fingerprint"])
    trained = [{p.name for p in (tmp_path / f"host-{r}/store/report/rows").glob("*.json")} for r in (0, 1)]
    assert trained[0] == trained[1] == {p.name for p in (reported.out / "report" / "rows").glob("*.json")}
    for name in trained[0]:
        assert len({p.read_bytes() for p in tmp_path.glob(f"host-*/store/report/rows/{name}")}) == 1


def send(rank, folder, damage):
    """Rank 0 and rank 1 have a file each (with ``damage`` rank 0 alone, which announces a wrong sha256); what they have in the end."""
    on_host(rank, folder)
    world = World("cpu").join()
    disks = Disks(world, folder / f"host-{rank}")
    home = folder / f"host-{rank}"
    (home / "x").mkdir(exist_ok=True)
    if rank == 0 or not damage:
        (home / "x" / f"{rank}.bin").write_bytes(bytes([rank]) * (2**24 + 5))
    if damage:
        gdd_dist.runtime.file_exchange.sha256_file = lambda path: "0" * 64
    error = ""
    try:
        disks.share(home / "x", ["*.bin"])
    except UserError as e:
        error = str(e)
        world.barrier()  # for which the other waits
    got = {p.name: p.read_bytes() == bytes([int(p.stem)]) * (2**24 + 5) for p in (home / "x").iterdir()}
    world.close()
    return {"shared": disks.shared, "files": got, "error": error}


def test_each_host_gets_what_the_other_has(tmp_path):
    for found in ranks.call(tmp_path, 2, send, tmp_path, False):
        assert found == {"shared": False, "files": {"0.bin": True, "1.bin": True}, "error": ""}


def shared(rank, folder):
    world = World("cpu").join()
    disks = Disks(world, folder)
    world.close()
    return {"shared": disks.shared, "left": [p.name for p in folder.glob(".shared-*")]}


def test_a_shared_disk_is_seen_as_one(tmp_path):
    assert ranks.call(tmp_path, 2, shared, tmp_path)[1] == {"shared": True, "left": []}


def test_a_file_that_changed_on_its_way_gets_no_name(tmp_path):
    found = ranks.call(tmp_path, 2, send, tmp_path, True)
    assert "damaged while it was sent from rank 0" in found[1]["error"]
    assert found[1]["files"] == {}


def test_what_a_killed_transfer_leaves_is_removed_like_other_temporary_files_of_a_step(tmp_path, monkeypatch):
    """Else it would be one of the files of the finished step."""
    disks, seen = Disks(), []
    disks._hosts = SimpleNamespace(rank=1, group=None)
    monkeypatch.setattr("torch.distributed.broadcast", lambda *_, **__: seen.append([*tmp_path.iterdir()]))
    with pytest.raises(UserError, match="damaged while it was sent"):  # nothing but zeros arrives
        disks._send(tmp_path / "a.npy", 0, 5, [False, True])
    assert [*tmp_path.iterdir()] == []
    (left,) = seen[-1]
    left.touch()
    clean(tmp_path)
    assert not left.exists()


@pytest.mark.slow
def test_hosts_with_different_data_are_refused(undisturbed, digits, tmp_path):
    for r in (0, 1):
        shutil.copytree(digits, tmp_path / f"host-{r}" / "data")
    manifest = tmp_path / "host-1" / "data" / "manifest.json"
    text = manifest.read_text()
    assert '"name": "digits"' in text
    manifest.write_text(text.replace('"name": "digits"', '"name": "digitz"'))
    argv = [*undisturbed.argv, "--data", "data", "--out", "out", "--preset", "digits"]
    ended = ranks.start(tmp_path / "a", argv, 2, before=functools.partial(on_host, folder=tmp_path)).wait()
    assert any("differs between hosts" in e for e in ended.errors), ended.text
