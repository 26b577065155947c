"""A lock has one holder, who is named, and a dead one does not keep it: also where neither flock nor links work."""

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from gdd_dist.runtime import locks
from gdd_dist.runtime.locks import Lock, holding
from gdd_dist.runtime.process_identity import me


@pytest.fixture(autouse=True, params=["links", "no links"])
def file_system(request, monkeypatch):
    """Whatever the file system can do, no lock here ever asks for flock."""
    if request.param == "no links":

        def link(*_args, **_kwargs):
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)
    return request.param


def test_a_lock_has_one_holder_who_is_named(tmp_path):
    first, second = Lock(tmp_path / "sub" / "a.lock"), Lock(tmp_path / "sub" / "a.lock")
    assert first.try_acquire() is None
    holder = second.try_acquire()
    assert holder["host"] == socket.gethostname()
    assert holder["pid"] == os.getpid()
    second.release()  # it holds nothing
    assert second.try_acquire() is not None
    first.release()
    assert second.try_acquire() is None
    second.release()
    assert list((tmp_path / "sub").iterdir()) == []


def test_a_lock_is_given_back_when_its_block_fails(tmp_path):
    with pytest.raises(RuntimeError), holding(Lock(tmp_path / "a.lock"), busy=lambda holder: pytest.fail("busy")):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_waiting_block_begins_when_the_holder_is_done(tmp_path):
    first, told = Lock(tmp_path / "a.lock"), []
    assert first.try_acquire() is None
    threading.Timer(0.3, first.release).start()
    with holding(Lock(tmp_path / "a.lock"), told.append):
        assert told
        assert told[0]["pid"] == os.getpid()


HOLD = "import sys; from gdd_dist.runtime.locks import Lock; from pathlib import Path; Lock(Path(sys.argv[1])).try_acquire()"


def left_by(path, **changes):
    """A lock file as a process left it."""
    path.write_text(json.dumps({**me(), "since": "2020-01-01", "born": 1, "id": "x" * 32} | changes))


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    path = tmp_path / "a.lock"
    dead = subprocess.Popen([sys.executable, "-c", f"{HOLD}; import os; os.kill(os.getpid(), 9)", str(path)])
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)  # dead, but nobody has taken note: a zombie
    assert json.loads(path.read_text())["pid"] == dead.pid
    lock = Lock(path)
    assert lock.try_acquire() is None
    assert json.loads(path.read_text())["pid"] == os.getpid()
    dead.wait()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_got_the_number_of_the_dead_one_does_not_keep_its_lock(tmp_path):
    left_by(tmp_path / "a.lock", pid=os.getpid(), born=1)
    assert Lock(tmp_path / "a.lock").try_acquire() is None


def test_of_many_who_find_a_dead_holder_one_takes_over(tmp_path):
    for _ in range(20):
        left_by(tmp_path / "a.lock")
        takers = [Lock(tmp_path / "a.lock") for _ in range(8)]
        with ThreadPoolExecutor(8) as pool:
            holders = list(pool.map(lambda lock: lock.try_acquire(), takers))
        assert holders.count(None) == 1
        for lock in takers:
            lock.release()
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", [None, "", '{"host":'], ids=["another host's", "empty", "torn"])
def test_a_lock_that_cannot_be_looked_up_is_judged_by_its_heartbeat(tmp_path, text):
    path = tmp_path / "a.lock"
    left_by(path, host="elsewhere", space="another boot")
    if text is not None:
        path.write_text(text)
    assert Lock(path).try_acquire() is not None
    long_ago = time.time() - locks.DEAD_AFTER - 1
    os.utime(path, (long_ago, long_ago))
    assert Lock(path).try_acquire() is None


def test_the_holder_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT", 0.02)
    lock = Lock(tmp_path / "a.lock")
    assert lock.try_acquire() is None
    os.utime(lock.path, (0, 0))
    end = time.monotonic() + 120
    while lock.path.stat().st_mtime < 1 and time.monotonic() < end:
        time.sleep(0.01)
    assert time.time() - lock.path.stat().st_mtime < 60
    lock.release()


def test_a_lock_given_back_while_another_looks_is_taken(tmp_path, monkeypatch):
    first, second = Lock(tmp_path / "a.lock"), Lock(tmp_path / "a.lock")
    assert first.try_acquire() is None
    look = Lock._read

    def gone_when_looked_at(path):
        first.path.unlink(missing_ok=True)
        monkeypatch.setattr(Lock, "_read", staticmethod(look))
        return look(path)

    monkeypatch.setattr(Lock, "_read", staticmethod(gone_when_looked_at))
    assert second.try_acquire() is None
    second.release()


def test_a_taker_that_died_as_it_took_over_does_not_keep_the_lock_either(tmp_path):
    path = tmp_path / "a.lock"
    left_by(path)
    left_by(tmp_path / f"a.lock.{'x' * 16}.dead", id="y" * 32)
    with holding(Lock(path), busy=lambda holder: None):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_nor_does_what_a_taker_left_who_died_just_after(tmp_path):
    left_by(tmp_path / f"a.lock.{'z' * 16}.dead", id="y" * 32)
    with holding(Lock(tmp_path / "a.lock"), busy=lambda holder: pytest.fail("busy")):
        assert [p.name for p in tmp_path.iterdir()] == ["a.lock"]


def test_a_process_of_another_container_of_the_same_name_is_not_taken_for_dead(tmp_path):
    """Its number means nothing here."""
    path = tmp_path / "a.lock"
    left_by(path, space="another boot/pid:[1]")
    holder = Lock(path).try_acquire()
    assert holder["host"] == socket.gethostname()
    assert not holder["local"]


def test_a_heartbeat_that_moves_shows_that_a_holder_elsewhere_lives(tmp_path):
    path = tmp_path / "a.lock"
    left_by(path, host="elsewhere", space="another boot")
    lock = Lock(path)
    assert lock.try_acquire() is not None
    assert lock.try_acquire() is not None
    assert not lock.moved
    os.utime(path, (time.time() + 3, time.time() + 3))
    assert lock.try_acquire() is not None
    assert lock.moved


STAND_STILL = (
    "import sys, time; from gdd_dist.runtime import locks; from pathlib import Path; locks.HEARTBEAT = 0.05; "
    "assert locks.Lock(Path(sys.argv[1])).try_acquire() is None; print('held', flush=True); time.sleep(600)"
)


def test_a_holder_whose_lock_was_taken_over_while_it_stood_still_ends_at_once(tmp_path):
    """Two jobs on one directory would write over each other."""
    path = tmp_path / "a.lock"
    with subprocess.Popen([sys.executable, "-c", STAND_STILL, str(path)], stdout=-1, stderr=-1, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        left_by(path, host="elsewhere", space="another boot", pid=7)
        err = holder.communicate(timeout=240)[1]
    assert holder.returncode == 2
    assert (
        err
        == f"error: {path} was taken over by process 7 on elsewhere while this process was suspended; let that process continue\n"
    )
    assert path.exists()


def test_what_killed_processes_left_behind_long_ago_is_removed_and_younger_files_are_not(tmp_path):
    old, young, kept = tmp_path / ".tmp-1", tmp_path / ".b.json.7.tmp", tmp_path / "b.json"
    for path in (old, young, kept):
        path.write_text("")
    long_ago = time.time() - locks.LEFT_BEHIND - 10
    os.utime(old, (long_ago, long_ago))
    os.utime(kept, (long_ago, long_ago))
    with holding(Lock(tmp_path / "a.lock"), busy=lambda holder: pytest.fail("busy")):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == [".b.json.7.tmp", "b.json"]


def test_a_lock_is_made_with_the_umask_of_the_user(tmp_path):
    before = os.umask(0o027)
    try:
        lock = Lock(tmp_path / "a.lock")
        assert lock.try_acquire() is None
        assert lock.path.stat().st_mode & 0o777 == 0o640
        lock.release()
    finally:
        os.umask(before)
