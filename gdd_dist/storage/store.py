"""What a step leaves behind: a directory named by the fingerprint of all that shaped it, whole or not there at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gdd_dist.storage.json_files import append_json, json_lines, read_json, write_json
from sharding.errors import UserError
from sharding.files import fsync_dir, remove_temporaries, sha256_file

CONTENTS = "contents.json"
CHECKPOINTS = "checkpoints"


class Whole:
    """Which files of an unfinished step were written whole: one list a rank, only ever appended to, so none can be torn."""

    def __init__(self, work: Path, rank: int) -> None:
        self._work, self._folder = work, work / CHECKPOINTS
        self._mine = self._folder / f"whole-{rank:05d}.jsonl"

    def note(self, path: Path, data: bytes) -> None:
        """``path``, below the step's directory, holds ``data``, durably."""
        entry = {
            "file": str(path.relative_to(self._work)),
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        self._folder.mkdir(exist_ok=True)
        append_json(self._mine, entry)

    def known(self) -> dict[str, set[tuple[int, str]]]:
        """File name → (bytes, sha256) of each time that any rank wrote it: after damage it is written again, perhaps by another rank."""
        found: dict[str, set[tuple[int, str]]] = {}
        for path in sorted(self._folder.glob("whole-*.jsonl")):
            for _, entry in json_lines(path):
                with suppress(ValueError, KeyError, TypeError):
                    found.setdefault(entry["file"], set()).add((int(entry["bytes"]), str(entry["sha256"])))
        return found

    def as_written(self) -> dict[str, tuple[int, str]]:
        """File name → (bytes, sha256), without reading it, unless it was written more than once and not alike.

        Raises UserError naming a file that has another size.
        """
        found = {}
        for name, entries in self.known().items():
            path = self._work / name
            size = path.stat().st_size if path.exists() else -1
            if size not in {written for written, _ in entries}:
                raise UserError(f"{path} is damaged (its size differs); run the same command again to compute it anew")
            found[name] = next(iter(entries)) if len(entries) == 1 else (size, sha256_file(path))
        return found


class Store:
    """STORE/<step>/<fingerprint>/ of every finished step, ``.partial`` beside it while a step works."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, step: str, fp: str) -> Path:
        """Where the finished step lies."""
        return self.root / step / fp

    def partial(self, step: str, fp: str) -> Path:
        """Where the step works."""
        return self.root / step / f"{fp}.partial"

    def finished(self, step: str, fp: str) -> bool:
        """Whether the step is there, whole."""
        return (self.path(step, fp) / CONTENTS).exists()

    def finish(self, step: str, fp: str, info: Mapping[str, Any], between: Callable[[], None] = lambda: None) -> Path:
        """Record size and sha256 of every file, flush, rename: from now on it is never written again. Then checkpoints go.

        What was hashed where it was written (`Whole`) is not read again.

        ``between`` is called between files and may raise: until the rename, nothing is lost.
        """
        work = self.partial(step, fp)
        clean(work)
        files, known = {}, Whole(work, 0).as_written()
        for p in sorted(work.rglob("*")):
            if p.is_file() and p.name != CONTENTS and work / CHECKPOINTS not in p.parents:
                between()
                name = str(p.relative_to(work))
                size, sha256 = known.get(name) or (p.stat().st_size, sha256_file(p))
                files[name] = {"bytes": size, "sha256": sha256}
        write_json(work / CONTENTS, {"format": "gdd-step/1", "step": step, "fingerprint": fp, **info, "files": files})
        for directory in sorted({p.parent for p in work.rglob("*") if p.is_file()}):
            fsync_dir(directory)
        os.rename(work, self.path(step, fp))
        fsync_dir(self.path(step, fp).parent)
        self.drop_checkpoints(step, fp)
        return self.path(step, fp)

    def drop_checkpoints(self, step: str, fp: str) -> None:
        """Remove what a finished step no longer needs; a kill after the rename leaves it there."""
        shutil.rmtree(self.path(step, fp) / CHECKPOINTS, ignore_errors=True)

    def files(self, step: str, fp: str) -> list[tuple[Path, int, str]]:
        """(path, bytes, sha256) of every file of a finished step."""
        directory = self.path(step, fp)
        contents = read_json(directory / CONTENTS)
        if contents.get("fingerprint") != fp or contents.get("step") != step:
            raise UserError(f"{directory / CONTENTS} belongs to another step; remove {directory} to compute it again")
        return [(directory / name, f["bytes"], f["sha256"]) for name, f in contents["files"].items()]


def clean(directory: Path) -> None:
    """Remove temporary files that a killed process left anywhere in a directory that is ours alone."""
    for one in (directory, *(d for d in directory.rglob("*") if d.is_dir())):
        remove_temporaries(one)


def verify_file(path: Path, size: int, sha256: str, remedy: str) -> None:
    """Raise UserError naming ``path`` when it is missing, has another size or another hash."""
    try:
        found = path.stat().st_size
    except OSError:
        raise UserError(f"{path} is missing; {remedy}") from None
    if found != size:
        raise UserError(f"{path} has {found} bytes instead of {size}; {remedy}")
    if sha256_file(path) != sha256:
        raise UserError(f"{path} is damaged (sha256 differs); {remedy}")


def link_latest(out: Path, step: str, target: Path) -> None:
    """OUT/<step>/latest → the finished directory, as a relative link, replaced in one move."""
    directory = out / step
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".tmp-{uuid.uuid4().hex}"
    temporary.symlink_to(os.path.relpath(target.resolve(), directory.resolve()))
    os.replace(temporary, directory / "latest")
