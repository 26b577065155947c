"""A step's directory is whole or not there; a lock has one holder, and a dead one does not keep it."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdd_dist import artifacts
from gdd_dist.artifacts import Lock, Store, fingerprint, holding, link_latest, read_json, verify_file, write_json
from sharding.errors import UserError

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values, max_size=5))
def test_a_fingerprint_does_not_depend_on_the_order_of_keys(parts):
    assert fingerprint(parts) == fingerprint(dict(reversed(parts.items())))


@given(st.dictionaries(st.text(), json_values, max_size=5), st.text(), json_values)
def test_a_fingerprint_tells_different_parts_apart(parts, key, value):
    other = {**parts, key: value}
    same = json.dumps(other, sort_keys=True) == json.dumps(parts, sort_keys=True)
    assert (fingerprint(other) == fingerprint(parts)) == same


def test_fingerprint_golden_value():
    assert fingerprint({"b": [1, 2.5, None], "a": "ü"}) == "703dceec79c30480"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_a_fingerprint_of_what_json_cannot_hold_is_refused(value):
    with pytest.raises((ValueError, TypeError)):
        fingerprint({"x": value})


def test_json_is_written_whole_and_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": [1, "ä"]})
    assert read_json(path) == {"x": [1, "ä"]}
    path.write_text('{"x": [1,')
    for damaged in (path, tmp_path / "none.json"):
        with pytest.raises(UserError, match=str(damaged)):
            read_json(damaged)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def fill(store, step="gan", fp="f" * 16):
    work = store.partial(step, fp)
    (work / "checkpoints").mkdir(parents=True)
    (work / "checkpoints" / "step-1.pt").write_bytes(b"c")
    (work / "deep").mkdir()
    (work / "deep" / "a.npy").write_bytes(b"abc")
    (work / "b.json").write_bytes(b"{}")
    (work / ".b.json.77.tmp").write_bytes(b"half")
    return work


def test_a_step_is_not_there_until_it_is_finished(store):
    work = fill(store)
    assert not store.finished("gan", "f" * 16)
    path = store.finish("gan", "f" * 16, {"info": {"n": 1}})
    assert store.finished("gan", "f" * 16)
    assert not work.exists()
    assert sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()) == [
        "b.json",
        "contents.json",
        "deep/a.npy",
    ]
    assert read_json(path / "contents.json")["info"] == {"n": 1}
    for file, size, sha256 in store.files("gan", "f" * 16):
        verify_file(file, size, sha256, "no fault")


def test_a_crash_while_finishing_leaves_it_unfinished(store, monkeypatch):
    fill(store)
    monkeypatch.setattr(artifacts.os, "rename", lambda *a: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(OSError, match="gone"):
        store.finish("gan", "f" * 16, {})
    assert not store.finished("gan", "f" * 16)
    monkeypatch.undo()
    store.finish("gan", "f" * 16, {})
    assert {str(p) for p, _, _ in store.files("gan", "f" * 16)} == {
        str(store.path("gan", "f" * 16) / name) for name in ("b.json", "deep/a.npy")
    }


def test_contents_of_another_step_are_refused(store):
    fill(store)
    store.finish("gan", "f" * 16, {}).rename(store.path("gan", "0" * 16))
    with pytest.raises(UserError, match="belongs to another step"):
        store.files("gan", "0" * 16)


def test_an_altered_file_is_named_with_what_to_do(tmp_path):
    path = tmp_path / "a.npy"
    path.write_bytes(b"abc")
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    verify_file(path, 3, sha256, "do this")
    for change in (b"abd", b"ab", b"abcd"):
        path.write_bytes(change)
        with pytest.raises(UserError, match=f"{path}.*do this"):
            verify_file(path, 3, sha256, "do this")
    path.unlink()
    with pytest.raises(UserError, match=f"{path} is missing; do this"):
        verify_file(path, 3, sha256, "do this")


def test_latest_is_a_relative_link_that_follows(tmp_path):
    for name in ("one", "two"):
        (tmp_path / "store" / "gan" / name).mkdir(parents=True)
        link_latest(tmp_path / "out", "gan", tmp_path / "store" / "gan" / name)
        link = tmp_path / "out" / "gan" / "latest"
        assert str(link.readlink()) == f"../../store/gan/{name}"
        assert link.resolve() == tmp_path / "store" / "gan" / name
    assert [p.name for p in (tmp_path / "out" / "gan").iterdir()] == ["latest"]


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


HOLD = (
    "import sys; from gdd_dist.artifacts import Lock; from pathlib import Path; Lock(Path(sys.argv[1])).try_acquire()"
)


def left_by(path, **changes):
    """A lock file as a process left it."""
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "born": 1, "since": "2020-01-01 00:00:00", "id": "x" * 32}
    path.write_text(json.dumps(mine | changes))


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
        locks = [Lock(tmp_path / "a.lock") for _ in range(8)]
        with ThreadPoolExecutor(8) as pool:
            holders = list(pool.map(lambda lock: lock.try_acquire(), locks))
        assert holders.count(None) == 1
        for lock in locks:
            lock.release()
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", [None, "", '{"host":'], ids=["another host's", "empty", "torn"])
def test_a_lock_that_cannot_be_looked_up_is_judged_by_its_heartbeat(tmp_path, text):
    path = tmp_path / "a.lock"
    left_by(path, host="elsewhere")
    if text is not None:
        path.write_text(text)
    assert Lock(path).try_acquire() is not None
    long_ago = time.time() - artifacts.DEAD_AFTER - 1
    os.utime(path, (long_ago, long_ago))
    assert Lock(path).try_acquire() is None


def test_the_holder_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "HEARTBEAT", 0.02)
    lock = Lock(tmp_path / "a.lock")
    assert lock.try_acquire() is None
    os.utime(lock.path, (0, 0))
    end = time.monotonic() + 10
    while lock.path.stat().st_mtime < 1 and time.monotonic() < end:
        time.sleep(0.01)
    assert time.time() - lock.path.stat().st_mtime < 60
    lock.release()


def test_a_lock_given_back_while_another_looks_is_taken(tmp_path, monkeypatch):
    first, second = Lock(tmp_path / "a.lock"), Lock(tmp_path / "a.lock")
    assert first.try_acquire() is None
    look = Lock._holder

    def gone_when_looked_at(self):
        first.path.unlink(missing_ok=True)
        monkeypatch.setattr(Lock, "_holder", look)
        return look(self)

    monkeypatch.setattr(Lock, "_holder", gone_when_looked_at)
    assert second.try_acquire() is None
    second.release()
