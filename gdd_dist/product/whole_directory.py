"""A directory of a user that is complete or not there: it is written under another name, and gets its own when it is whole."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gdd_dist.runtime.locks import Lock
from gdd_dist.runtime.signals import stoppable
from gdd_dist.storage.json_files import fingerprint
from gdd_dist.storage.store import CONTENTS
from sharding.errors import UserError
from sharding.files import fsync_dir


def check_new(dest: Path) -> None:
    """Raise UserError unless ``dest`` does not exist or is empty. What a killed export left in it does not count."""
    if dest.is_symlink() and not dest.exists():
        raise UserError(f"{dest} is a link whose target does not exist; choose a new DEST")
    if dest.exists() and (not dest.is_dir() or any(p != _work(dest) for p in dest.iterdir())):
        raise UserError(f"{dest} is not empty; choose a new DEST")
    if any((parent / CONTENTS).exists() for parent in dest.resolve().parents):
        raise UserError(f"{dest} would lie in a finished step of a run, which must not change; choose a DEST elsewhere")


def _work(dest: Path) -> Path:
    """Return the directory in which ``dest`` is written: one name for each, so that the next export finds what a killed one left.

    An existing directory may be a link, a mount or somebody's working directory, so it is filled, not replaced.
    """
    if dest.is_dir():
        return dest / ".gdd-export.partial"
    return dest.with_name(f".gdd-export-{fingerprint({'name': dest.name})}.partial")


@contextmanager
def whole_directory(dest: Path, last: str) -> Iterator[Path]:
    """Yield an empty directory. When the block ends well its content is flushed and is ``dest``'s, else nothing is left.

    ``last``: the file that is moved last into an existing ``dest``. A signal that ends the program ends the block by SystemExit.
    Raises UserError while another process writes the same ``dest``.
    """
    work = _work(dest)
    lock = Lock(work / ".lock")
    if (holder := lock.try_acquire()) is not None:
        who = f"process {holder['pid']} on {holder['host']}"
        raise UserError(f"{dest} is being written by {who}; wait for it, or choose another DEST")
    with stoppable(f"{dest} was not written; run the same command again") as ignore_signals:
        try:
            _empty(work, lock.path)
            yield work
            ignore_signals()  # what follows is short, and a part of it cannot be undone
            lock.release()
            _move(work, dest, last)
        except BaseException:
            lock.release()
            shutil.rmtree(work, ignore_errors=True)
            raise


def _empty(work: Path, keep: Path) -> None:
    for path in work.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != keep:
            path.unlink()


def _move(work: Path, dest: Path, last: str) -> None:
    for directory in (*(d for d in work.rglob("*") if d.is_dir()), work):
        fsync_dir(directory)
    if work.parent != dest:
        os.replace(work, dest)
        fsync_dir(dest.parent)
        return
    for path in sorted(work.iterdir(), key=lambda p: p.name == last):
        os.replace(path, dest / path.name)
    work.rmdir()
    fsync_dir(dest)
