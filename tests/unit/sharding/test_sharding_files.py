import subprocess
import sys

import pytest
from test_sharding_support import environment

from sharding.errors import UserError
from sharding.files import atomic_file, exclusive_lock, remove_temporaries, sha256_file, write_atomic


def test_a_written_file_is_whole_and_leaves_nothing_beside_it(tmp_path):
    write_atomic(tmp_path / "a", b"old")
    write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_failed_write_keeps_the_old_file_and_cleans_up(tmp_path):
    write_atomic(tmp_path / "a", b"old")

    def fail() -> None:
        with atomic_file(tmp_path / "a") as stream:
            stream.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_leftovers_of_a_killed_writer_are_removed_and_nothing_else(tmp_path):
    for name in ("a", ".hidden", ".a.123.tmp"):
        (tmp_path / name).write_bytes(b"x")
    remove_temporaries(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a", ".hidden"}


def test_sha256_of_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_message_of_a_user_error_is_one_line():
    assert str(UserError("two\nlines")) == "two lines"


def test_a_lock_is_exclusive_and_ends_with_its_holder(tmp_path):
    path = tmp_path / "lock"
    script = (
        "import sys, pathlib; from sharding.files import exclusive_lock\n"
        "with exclusive_lock(pathlib.Path(sys.argv[1]), 'busy'):\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
        text=True,
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="busy"), exclusive_lock(path, "busy"):
            pass
        holder.kill()
    with exclusive_lock(path, "busy"):
        pass


def test_an_error_about_another_file_keeps_its_name(tmp_path):
    for fault, named in ((OSError(5, "bad"), "a"), (FileNotFoundError(2, "gone", str(tmp_path / "b")), "b")):
        with pytest.raises(OSError, match="bad|gone") as caught, atomic_file(tmp_path / "a"):
            raise fault
        assert caught.value.filename == str(tmp_path / named)
    with pytest.raises(OSError, match="No such file") as caught, atomic_file(tmp_path / "none" / "a"):
        pass
    assert caught.value.filename == str(tmp_path / "none" / "a")
    assert not list(tmp_path.iterdir())
