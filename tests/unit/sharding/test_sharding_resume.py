import json
import os
import signal
import subprocess
import time

import pytest
from test_sharding_support import command, contents, encoded, environment, pixels, run, write_folder

from sharding.errors import UserError
from sharding.files import exclusive_lock
from sharding.images import Seen, Target
from sharding.links import Member
from sharding.manifest import Manifest
from sharding.options import Options
from sharding.plan import Plan, Planned, ShardPlan
from sharding.writer import build

ONE = Options(workers=1, test_fraction=0.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("source") / "data", {"a": 30, "b": 20, "c": 10})


def test_the_same_build_again_changes_nothing(folder, tmp_path):
    build(f"folder:{folder}", tmp_path / "d", ONE)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert build(f"folder:{folder}", tmp_path / "d", ONE).reused
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_finished_data_set_is_never_overwritten(folder, tmp_path):
    dest = tmp_path / "d"
    build(f"folder:{folder}", dest, ONE)
    before = contents(dest, without=())
    other = write_folder(tmp_path / "other", {"a": 6, "b": 6})
    for source, options in (
        (f"folder:{other}", ONE),
        ("digits", Options(workers=1)),
        (f"folder:{folder}", Options(workers=1, test_fraction=0.2, seed=1)),
        (f"folder:{folder}", Options(workers=1, test_fraction=0.2, image_size=4)),
    ):
        with pytest.raises(UserError, match="already holds a different finished data set"):
            build(source, dest, options)
    assert contents(dest, without=()) == before
    (dest / "train/000000.tar").write_bytes(b"x")
    with pytest.raises(UserError, match=r"train/000000\.tar holds 1 bytes"):
        build(f"folder:{folder}", dest, ONE)


def test_a_destination_inside_the_source_is_refused(tmp_path):
    folder = write_folder(tmp_path / "s", {"a": 4, "b": 4})
    for dest in (folder, folder / "out", folder / "a/out"):
        with pytest.raises(UserError, match="lies inside the source .*; choose another DEST"):
            build(f"folder:{folder}", dest, ONE)
    assert {path.name for path in folder.iterdir()} == {"a", "b"}


@pytest.mark.parametrize("name", ["notes.txt", "train/a/1.png", "manifest.json"])
def test_a_directory_that_holds_anything_else_is_refused(folder, tmp_path, name):
    (tmp_path / "d" / name).parent.mkdir(parents=True)
    (tmp_path / "d" / name).write_bytes(b"mine")
    with pytest.raises(UserError, match="already holds .*; choose an empty or a new DEST"):
        build(f"folder:{folder}", tmp_path / "d", ONE)
    assert contents(tmp_path / "d") == {name: b"mine"}
    with pytest.raises(UserError, match="is not a directory"):
        build(f"folder:{folder}", tmp_path / "d" / name, ONE)


def test_two_builds_of_one_directory_exclude_each_other(folder, tmp_path):
    (tmp_path / "d/.build").mkdir(parents=True)
    with (
        exclusive_lock(tmp_path / "d/.build/lock", ""),
        pytest.raises(UserError, match="another build is writing .*; wait for it"),
    ):
        build(f"folder:{folder}", tmp_path / "d", ONE)
    build(f"folder:{folder}", tmp_path / "d", ONE)


def killed_build(arguments: list[object], dest) -> None:
    """Start a build, kill -9 its main process when three shards are there, and wait for its workers to end."""
    process = subprocess.Popen(
        command("build", *arguments), env=environment(), stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 240
    while len(list(dest.glob(".build/*.json"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    # The pipe closes when the last process that inherited it has gone: no worker outlives its parent.
    process.communicate(timeout=240)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_build_leaves_no_data_set_and_goes_on_to_the_same_bytes(tmp_path, workers):
    folder = write_folder(tmp_path / "s", {"a": 100, "b": 100})
    options = ["--test-fraction", 0.2, "--shard-size", "10KB", "--workers", workers]
    build(f"folder:{folder}", tmp_path / "whole", Options(workers=1, test_fraction=0.2, shard_size=10_000))
    dest = tmp_path / "dest"
    killed_build([f"folder:{folder}", dest, *options], dest)
    assert not (dest / "manifest.json").exists()
    with pytest.raises(UserError, match="not finished; run the same build command again"):
        Manifest.load(dest)
    (dest / "train/.000001.tar.1.tmp").write_bytes(b"torn")
    finished = sorted(dest.glob(".build/*.json"))
    shard = dest / json.loads(finished[0].read_text())["info"]["file"]
    times = {path: path.stat().st_mtime_ns for path in dest.glob("*/*.tar")}
    shard.write_bytes(shard.read_bytes()[:-1])
    done = run("build", f"folder:{folder}", dest, *options)
    assert done.returncode == 0
    assert f"continuing an unfinished build: {len(finished) - 1} of " in done.stderr
    assert contents(dest, without=()) == contents(tmp_path / "whole", without=())
    kept = [path for path, changed in times.items() if path.stat().st_mtime_ns == changed]
    assert len(kept) >= len(finished) - 1


def test_an_unfinished_build_of_something_else_is_not_reused(tmp_path):
    folder = write_folder(tmp_path / "s", {"a": 100, "b": 100})
    dest = tmp_path / "dest"
    options = ["--test-fraction", 0.2, "--shard-size", "10KB", "--workers", 1]
    killed_build([f"folder:{folder}", dest, *options], dest)
    assert list(dest.glob("train/*.tar"))
    (folder / "a/0000.png").write_bytes(encoded(pixels(10**9)))
    lines: list[str] = []
    changed = Options(workers=1, test_fraction=0.2, shard_size=40_000)
    build(f"folder:{folder}", dest, changed, log=lines.append)
    build(f"folder:{folder}", tmp_path / "whole", changed)
    assert not [line for line in lines if "going on" in line]
    assert contents(dest, without=()) == contents(tmp_path / "whole", without=())


def test_versions_that_stored_grey_images_otherwise_do_not_share_a_build(monkeypatch):
    def plan(grey):
        seen = Seen(b"0" * 32, 8, 8, grey, "jpg")
        planned = Planned("00000000", Member("a/1.jpg", 9), 0, seen)
        return Plan("x", ("a",), Target(8, 8, 3), (ShardPlan("train", "train/000000.tar", (planned,)),))

    now = [plan(grey).fingerprint for grey in (False, True)]
    monkeypatch.setattr(Target, "keeps", lambda self, seen: not seen.grey)
    before = [plan(grey).fingerprint for grey in (False, True)]
    assert now[0] == before[0]
    assert now[1] != before[1]


def test_a_source_that_changes_while_it_is_built_is_found(tmp_path, monkeypatch):
    import sharding.writer as writer

    folder = write_folder(tmp_path / "s", {"a": 10, "b": 10})
    real = writer.make_plan

    def change_then_plan(*arguments):
        (folder / "a/0000.png").write_bytes(encoded(pixels(10**9)))
        return real(*arguments)

    monkeypatch.setattr(writer, "make_plan", change_then_plan)
    with pytest.raises(UserError, match=r"a/0000\.png changed while the data set was built"):
        build(f"folder:{folder}", tmp_path / "d", ONE)
    assert not (tmp_path / "d/manifest.json").exists()


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path):
    folder = write_folder(tmp_path / "s", {"a": 60, "b": 60})
    arguments = command("build", f"folder:{folder}", tmp_path / "d", "--test-fraction", "0.2", "--workers", "1")
    # No file may grow beyond 40 KB: the train shard does.
    script = (
        "import resource, os, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (40960, 40960)); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    limited = [arguments[0], "-c", script, *arguments]
    failed = subprocess.run(limited, env=environment(), capture_output=True, text=True, check=False, timeout=240)
    assert failed.returncode == 2
    assert [line for line in failed.stderr.splitlines() if line.startswith("error:")]
    assert "Traceback" not in failed.stderr
    assert not list((tmp_path / "d").rglob("*.tmp"))
    assert not (tmp_path / "d/manifest.json").exists()
    assert build(f"folder:{folder}", tmp_path / "d", ONE).manifest == Manifest.load(tmp_path / "d")
