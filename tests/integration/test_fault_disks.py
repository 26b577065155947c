"""A disk that is full, read-only or gone ends the job with one line; the old checkpoint is whole, the same command goes on."""

import errno
import functools
import os
import shutil
import subprocess
from pathlib import Path

import hooks
import pytest
import ranks
from test_fault_preemption import same_weights

from gdd_dist.storage.checkpoints import Checkpoints

NAME = "gan"


@pytest.fixture
def disk(tmp_path, request):
    """A small disk of its own."""
    if os.geteuid() != 0:
        pytest.skip("needs root: mounts a file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "none", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


def newest_is_whole(out: Path, step: int) -> bool:
    """Whether the last checkpoint before the fault is there, whole, and no half of another beside it."""
    (folder,) = out.glob("gan/*.partial/checkpoints")
    said: list[str] = []
    found = Checkpoints(folder, 0, said.append).load()
    return found is not None and found[0] == step and not said and not list(folder.glob(".*"))


def refused_at_step_6(undisturbed, out, action, logs=None):
    hook = functools.partial(hooks.call_in, where=NAME, call=6, action=action)
    return ranks.refused(out, [*undisturbed.argv, "--until", "gan"], 4, before=hook, logs=logs)


def goes_on(undisturbed, out):
    found = ranks.train(out, [*undisturbed.argv, "--until", "gan"], 4)
    return found["gan"]["status"] == "resumed" and same_weights(undisturbed, out, "gan")


@pytest.mark.root
def test_a_full_disk_ends_the_job_and_the_same_command_goes_on_once_there_is_room(undisturbed, disk, tmp_path):
    out = undisturbed.copy(disk / "out", "teachers", "logits")
    line = refused_at_step_6(undisturbed, out, functools.partial(hooks.fill_disk, disk), tmp_path)
    assert f"error: {out}" in line
    assert "No space left on device; free some space and run the same command again" in line
    assert newest_is_whole(out, 6)
    (disk / "filler").unlink()
    assert goes_on(undisturbed, out)


@pytest.mark.root
def test_a_disk_that_goes_in_mid_write_is_said_and_nothing_is_written_in_its_place(undisturbed, disk, tmp_path):
    out = undisturbed.copy(disk / "out", "teachers", "logits")
    still = tmp_path / "still"
    still.mkdir()
    subprocess.run(["mount", "--bind", str(disk), str(still)], check=True)
    try:
        line = refused_at_step_6(undisturbed, out, functools.partial(hooks.unmount, disk), tmp_path)
        assert f"error: {out}" in line
        assert "check that the disk is still mounted, then run the same command again" in line
        assert list(disk.iterdir()) == []
        assert newest_is_whole(still / "out", 6)
        subprocess.run(["mount", "--bind", str(still), str(disk)], check=True)
        assert goes_on(undisturbed, out)
    finally:
        subprocess.run(["umount", "-l", str(still)], check=True)


@pytest.mark.root
def test_a_read_only_disk_is_said_at_once(undisturbed, disk, tmp_path):
    out = undisturbed.copy(disk / "out", "teachers", "logits")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    line = ranks.refused(out, [*undisturbed.argv, "--until", "gan"], 2, logs=tmp_path)
    assert f"error: {out}" in line
    assert "Read-only file system; make it writable or choose another --out" in line


@pytest.mark.root
def test_logits_that_will_not_fit_are_refused_before_any_is_computed(undisturbed, disk):
    out = undisturbed.copy(disk / "out", "teachers")
    line = ranks.refused(out, [*undisturbed.argv, "--until", "logits", "--logits.views", "300"], 2)
    assert "the logits need" in line
    assert "free some space, point --store elsewhere" in line


FAULTS = {
    "full": (errno.ENOSPC, "free some space and run the same command again"),
    "over quota": (errno.EDQUOT, "free some of your quota and run the same command again"),
    "read-only": (errno.EROFS, "make it writable or choose another --out"),
    "broken": (errno.EIO, "check that the disk is still mounted"),
}


@pytest.mark.parametrize(
    "fault", [pytest.param(f, marks=[] if f == "over quota" else pytest.mark.slow) for f in FAULTS]
)
def test_a_flush_that_fails_names_its_file_and_what_to_do(undisturbed, tmp_path, fault):
    number, says = FAULTS[fault]
    out = undisturbed.copy(tmp_path / "out", "teachers", "logits")
    line = refused_at_step_6(undisturbed, out, functools.partial(hooks.fail_writes, number))
    assert f"error: {out}" in line
    assert ".partial/checkpoints/step-000000007.pt: " in line
    assert says in line
    assert newest_is_whole(out, 6)
    assert goes_on(undisturbed, out)


def test_a_disk_that_fails_one_rank_ends_those_too_who_wait_for_it_in_a_barrier(undisturbed, tmp_path):
    out = undisturbed.copy(tmp_path / "out", "teachers")
    others = len(list(undisturbed.out.glob("logits/latest/teacher-*/*.npy"))) - 1
    hook = functools.partial(hooks.fail_last_file, marker=tmp_path / "there", files=others, number=errno.EIO)
    ended = ranks.start(out, [*undisturbed.argv, "--until", "logits"], 4, before=hook).wait()
    assert ended.codes == [2] * 4, ended.text
    (line,) = ended.errors
    assert line in ended.err[1]
    assert f"error: {out}" in line
    assert ".npy: Input/output error; check that the disk is still mounted" in line
    assert all("because another rank failed" in ended.err[r] for r in (0, 2, 3))


def test_a_limit_on_the_size_of_files_is_a_disk_that_is_full(undisturbed, tmp_path):
    out = undisturbed.copy(tmp_path / "out", "teachers", "logits")
    line = refused_at_step_6(undisturbed, out, functools.partial(hooks.limit_files, 50_000))
    assert f"error: {out}" in line
    assert "File too large; raise the limit on the size of files" in line
    assert newest_is_whole(out, 6)


def test_what_a_killed_job_left_behind_is_gone_after_the_next(undisturbed, tmp_path):
    out = undisturbed.copy(tmp_path / "out", "teachers", "logits")
    hook = functools.partial(hooks.die_in_gan, victim=0, step=6)
    assert ranks.start(out, [*undisturbed.argv, "--until", "gan"], before=hook).wait().codes == [-9]
    (folder,) = out.glob("gan/*.partial/checkpoints")
    left = [folder / ".step-000000007.pt.99.tmp", folder.parent / ".generator.safetensors.99.tmp", out / ".tmp-99"]
    for path in left:
        path.write_bytes(b"half")
        os.utime(path, (0, 0))
    ranks.train(out, [*undisturbed.argv, "--until", "gan"])
    assert not any(path.exists() for path in left)
    names = [p.name for p in out.rglob("*")]
    assert not [n for n in names if n.startswith(".") or n.endswith((".partial", ".lock", ".dead"))]


def test_ranks_keep_nothing_in_shared_memory_that_a_kill_could_leave_there(undisturbed, tmp_path):
    out = undisturbed.copy(tmp_path / "out", "teachers", "logits")
    hook = functools.partial(hooks.hold_in_gan, until=tmp_path / "never")
    job = ranks.start(out, [*undisturbed.argv, "--until", "gan"], 2, before=hook)
    job.until(lambda: bool(list(out.glob("gan/*.partial/checkpoints/step-*5.pt"))))
    for process in job.processes:
        maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        names = [line.split(maxsplit=5)[5] for line in maps if "/dev/shm" in line]
        names += [os.readlink(p) for p in Path(f"/proc/{process.pid}/fd").iterdir()]
        assert not [n for n in names if n.startswith("/dev/shm") and not n.endswith("(deleted)")]
    job.send(9)
    job.wait()


@pytest.mark.parametrize("step", ["teachers", "logits"])
def test_damage_to_an_unfinished_step_is_found_and_done_again(undisturbed, tmp_path, step):
    """What a killed run has finished of a step is trusted by its checksum, never by its name."""
    out = undisturbed.copy(tmp_path / "out", *(["teachers"] if step == "logits" else []))
    argv = [*undisturbed.argv, "--until", step]
    where = {"teachers": "steps.teacher_pool.accuracy", "logits": "steps.logits._write"}[step]
    hook = functools.partial(hooks.signal_in, where=where, call=3, number=9, victim=0)
    assert ranks.start(out, argv, before=hook).wait().codes == [-9]
    (work,) = (out / step).glob("*.partial")
    path = min(work.rglob("*.npy" if step == "logits" else "*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    ended = ranks.start(out, argv).wait()
    assert ended.codes == [0], ended.text
    assert ended.err[0].count(f"{step}: {path} is damaged (sha256 differs); it") == 1
    assert same_weights(undisturbed, out, step)
    shutil.rmtree(out)
