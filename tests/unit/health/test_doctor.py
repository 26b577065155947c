"""python -m gdd_dist.doctor: for each thing that is wrong, the right advice."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch

from gdd_dist import doctor
from gdd_dist.health import checks, isolated_checks
from gdd_dist.health.finding import FAIL, OK, WARN, Finding

NEEDS = ["torch>=2.11", "numpy>=1.26", 'ray[tune]>=2.50; extra == "tune"']


def test_a_good_machine_is_ready_and_every_line_is_there(
    tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor.main(["--out", str(tmp_path / "runs"), "--data", str(digits), "--json"], lambda _world: None)
    found = {f["name"]: f for f in json.loads(capsys.readouterr().out)}
    assert {
        "python",
        "packages",
        "torch",
        "devices",
        "disk",
        "temporary",
        "data",
        "open files",
        "jpeg",
        "speed",
    } <= set(found)
    assert {"backends", "compiler", "deepspeed", "ray", "port 29500", "port 6006"} <= set(found)
    assert not [f for f in found.values() if f["state"] == FAIL]
    assert "images/s on one thread" in found["jpeg"]["detail"]
    assert re.search(r"fixed training loop: \d+\.\d\d s on one CPU thread", found["speed"]["detail"])
    assert not (tmp_path / "runs").exists(), "the doctor leaves something behind"


def test_a_fault_ends_with_1_and_stands_beside_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [Finding("disk", FAIL, "full " * 40, "free some space"), Finding("ray", WARN, "not there", "install it")]
    monkeypatch.setattr(doctor, "examine", lambda _arguments: iter(found))
    with pytest.raises(SystemExit) as e:
        doctor.main([], lambda _world: None)
    assert e.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= doctor.WIDTH
    assert lines.index("            → free some space") == lines.index("warn  ray   not there") - 1
    assert lines[-1] == "1 of 2 checks failed: fix those first"


@pytest.fixture
def empty_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No program is found."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    return folder


def test_no_compiler(empty_path: Path) -> None:
    found = isolated_checks.compiler()
    assert (found.state, found.detail) == (WARN, "no C++ compiler (c++ is not installed)")
    assert "apt install g++" in found.fix
    assert "deepspeed" in found.fix


def test_a_compiler_that_does_not_compile(empty_path: Path) -> None:
    fake = empty_path / "c++"
    fake.write_text("#!/bin/sh\necho 'fatal error: vector: No such file' >&2\nexit 1\n")
    fake.chmod(0o755)
    found = isolated_checks.compiler()
    assert found.state == WARN
    assert "fatal error: vector" in found.detail


def test_a_compiler_without_ninja(empty_path: Path) -> None:
    fake = empty_path / "c++"
    fake.write_text("#!/bin/sh\nexit 0\n")
    fake.chmod(0o755)
    found = isolated_checks.compiler()
    assert (found.state, found.detail) == (WARN, "c++ works, ninja is not on PATH")
    assert ".venv" in found.fix


def test_a_port_that_is_taken_names_one_that_is_free() -> None:
    with socket.socket() as s:
        s.bind(("0.0.0.0", 0))
        s.listen()
        number = s.getsockname()[1]
        found = checks.port(number, "torchrun", "give --rdzv_endpoint=HOST:{free}")
        assert (found.state, found.detail) == (WARN, "used by another program, but torchrun needs it")
        other = int(found.fix.rpartition(":")[2])
        assert other > number
    assert checks.port(number, "torchrun", "").state == OK


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A disk that is mounted read-only."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount")
    where = tmp_path / "disk"
    where.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(where)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting is not allowed here")
    yield where
    subprocess.run(["umount", str(where)], check=True)


@pytest.mark.root
def test_a_read_only_disk(read_only: Path) -> None:
    for directory in (read_only, read_only / "runs"):
        found = checks.disk(directory)
        assert found.state == FAIL
        assert "read-only file system" in found.detail
        assert f"remount,rw $(findmnt -n -o TARGET --target {read_only})" in found.fix
        assert "another --out" in found.fix


@pytest.mark.parametrize(
    ("number", "said"),
    [(30, "remount,rw"), (13, "chown or chmod"), (28, "free some space"), (95, "lacks; choose another --out")],
)
def test_a_disk_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str) -> None:
    def write(path: Path, _data: bytes) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(checks, "write_atomic", write)
    found = checks.disk(tmp_path / "new")
    assert found.state == FAIL
    assert said in found.fix
    assert not (tmp_path / "new").exists()


def test_a_disk_that_is_nearly_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, state in ((1e8, FAIL), (1e9, WARN), (1e11, OK)):
        usage: Any = type("Usage", (), {"free": free})
        monkeypatch.setattr(checks.shutil, "disk_usage", lambda _d, usage=usage: usage)
        assert checks.disk(tmp_path).state == state


def test_wrong_and_missing_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    have = {"torch": "2.3.1", "numpy": "2.0.0"}

    def version(name: str) -> str:
        if name not in have:
            raise metadata.PackageNotFoundError(name)
        return have[name]

    monkeypatch.setattr(checks.metadata, "requires", lambda _name: NEEDS)
    monkeypatch.setattr(checks.metadata, "version", version)
    base, tune = checks.packages()
    assert (base.name, base.state, base.detail) == ("packages", FAIL, "torch is 2.3.1, but >=2.11 is needed")
    assert base.fix == "python -m pip install --upgrade 'torch>=2.11'"
    assert (tune.name, tune.state, tune.detail) == ("extra tune", WARN, "ray is missing")
    assert tune.fix == "python -m pip install --upgrade 'ray[tune]>=2.50'"
    have.update(torch="2.14.1", ray="2.60.0")
    assert {f.state for f in checks.packages()} == {OK}
    monkeypatch.setattr(checks.platform, "python_version_tuple", lambda: ("3", "10", "1"))
    assert checks.python().state == FAIL


def test_torch_and_torchvision_that_do_not_belong_together(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.ops

    def nms(*_args: Any) -> None:
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    monkeypatch.setattr(torchvision.ops, "nms", nms)
    found = checks.torch_pair()
    assert found.state == FAIL
    assert found.detail.endswith("operator torchvision::nms does not exist")
    assert "torch torchvision together" in found.fix


def test_a_gpu_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch, empty_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (empty_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (empty_path / "nvidia-smi").chmod(0o755)
    for cuda, fix in ((None, "reinstall torch torchvision"), ("13.0", "one that supports CUDA 13.0")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        found = checks.devices()
        assert found.state == FAIL
        assert fix in found.fix


def test_gpus_that_the_user_hides_are_no_fault(monkeypatch: pytest.MonkeyPatch, empty_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (empty_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (empty_path / "nvidia-smi").chmod(0o755)
    found = checks.devices()
    assert found.state == OK
    assert "hides" in found.detail


def test_a_backend_that_does_not_come_up_says_which_interface_to_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    found = isolated_checks.backends()
    assert found.state == FAIL
    assert "GLOO_SOCKET_IFNAME" in found.fix


def test_what_hangs_ends_with_all_that_it_started(tmp_path: Path) -> None:
    script = f"import os, time; open('{tmp_path}/pid', 'w').write(str(os.fork() or os.getpid())); time.sleep(600)"
    assert isolated_checks.call(script, seconds=8) == "no response within 8 s"
    status = Path("/proc", (tmp_path / "pid").read_text(), "status")
    assert not status.exists() or "zombie" in status.read_text()


def test_what_hangs_is_not_waited_for() -> None:
    assert isolated_checks.call("import time; time.sleep(60)", seconds=1) == "no response within 1 s"
    assert isolated_checks.call("raise SystemExit('no')") == "no"
    assert isolated_checks.call("pass") is None


def test_on_a_busy_machine_a_trial_that_is_late_is_no_fault_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated_checks, "call", lambda *_: "no response within 90 s")
    for found in (
        isolated_checks.deepspeed(False),
        isolated_checks.deepspeed(True),
        isolated_checks.ray(True),
        isolated_checks.backends(),
    ):
        assert "busy" in found.fix


def test_torn_data_is_named(digits: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(digits, tmp_path / "data"))
    assert checks.data_set(copy).state == OK
    shard = copy / "train" / "000000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    assert str(shard) in checks.data_set(copy).detail
    (copy / "manifest.json").unlink()
    assert checks.data_set(copy).state == FAIL


def _doctor(rank: int, folder: Path) -> list[list[str]]:
    from gdd_dist.runtime.world import World

    own = folder / str(rank) if (folder / "apart").exists() else folder
    world = World("cpu", 60).join()
    found = doctor.together(world, own)
    world.close()
    return [[f.name, f.state, f.detail] for f in found]


def test_ranks_see_whether_they_share_a_disk(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    for answer in ranks.call(tmp_path / "a", 2, _doctor, shared):
        assert [a[1] for a in answer] == [OK, OK]
    assert not list(shared.iterdir())
    (shared / "apart").touch()
    for name in ("0", "1"):
        (shared / name).mkdir()
    for answer in ranks.call(tmp_path / "b", 2, _doctor, shared):
        assert answer[0][1] == FAIL
        assert "does not see the file that rank" in answer[0][2]


def test_nodes_with_other_versions_are_named() -> None:
    found = doctor._same_versions([{"torch": "2.14.1"}, {"torch": "2.11.0"}])
    assert (found.state, found.detail) == (FAIL, "rank 0 has torch 2.14.1, rank 1 has 2.11.0")


@pytest.mark.slow
@pytest.mark.compiler
def test_deepspeeds_operation_builds_and_ray_starts() -> None:
    assert isolated_checks.deepspeed(build=True).state == OK
    assert isolated_checks.ray(start=True).state == OK


def test_a_host_whose_own_name_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "localhost")
    assert checks.host_name().state == checks.OK
    monkeypatch.setattr("socket.gethostname", lambda: "no.such.host.invalid")
    finding = checks.host_name()
    assert finding.state == checks.WARN
    assert "/etc/hosts" in finding.fix
