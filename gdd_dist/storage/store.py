"""The outputs of steps: a directory named by the fingerprint of everything that determines it, complete or missing."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gdd_dist.storage.json_files import ALONE, again, append_json, json_lines, read_json, write_json
from sharding.errors import UserError
from sharding.files import fsync_dir, link_atomic, remove_temporaries, sha256_file

CONTENTS = "contents.json"
RECORDS = "steps.json"
CHECKPOINTS = "checkpoints"


class Whole:
    """Records completely written files of an unfinished step. Each rank appends to its own list, so no crash destroys one."""

    def __init__(self, work: Path, rank: int) -> None:
        self._work, self._folder = work, work / CHECKPOINTS
        self._mine = self._folder / f"whole-{rank:05d}.jsonl"

    def note(self, path: Path, data: bytes) -> None:
        """Record that ``path``, below the step's directory, durably holds ``data``."""
        entry = {
            "file": str(path.relative_to(self._work)),
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        self._folder.mkdir(exist_ok=True)
        append_json(self._mine, entry)

    def known(self) -> dict[str, set[tuple[int, str]]]:
        """Return file name → (bytes, sha256) of each time it was written; after damage, another rank may have written it again."""
        found: dict[str, set[tuple[int, str]]] = {}
        for path in sorted(self._folder.glob("whole-*.jsonl")):
            for _, entry in json_lines(path):
                with suppress(ValueError, KeyError, TypeError):
                    found.setdefault(entry["file"], set()).add((int(entry["bytes"]), str(entry["sha256"])))
        return found

    def as_written(self) -> dict[str, tuple[int, str]]:
        """Return file name → (bytes, sha256); reads only files with several versions. Raises UserError naming a file of another size."""
        found = {}
        for name, entries in self.known().items():
            path = self._work / name
            size = path.stat().st_size if path.exists() else -1
            if size not in {written for written, _ in entries}:
                raise UserError(f"{path} is damaged (its size differs); run the same command again to recompute it")
            found[name] = next(iter(entries)) if len(entries) == 1 else (size, sha256_file(path))
        return found


class Store:
    """STORE/<step>/<fingerprint>/ of every finished step, ``.partial`` beside it while a step works."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, step: str, fp: str) -> Path:
        """Return the directory of the finished step."""
        return self.root / step / fp

    def partial(self, step: str, fp: str) -> Path:
        """Return the directory in which the step works until it is finished."""
        return self.root / step / f"{fp}.partial"

    def finished(self, step: str, fp: str) -> bool:
        """Whether the step is finished."""
        return (self.path(step, fp) / CONTENTS).exists()

    def finish(self, step: str, fp: str, info: Mapping[str, Any], between: Callable[[], None] = lambda: None) -> Path:
        """Record size and sha256 of every file, flush, rename (the directory is now final), and remove the checkpoints.

        Files that were hashed when they were written (`Whole`) are not read again. ``between`` is called between files and may
        raise, because nothing is lost before the rename.
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
        """Remove the checkpoints of a finished step, which remain if the process is killed just after the rename."""
        shutil.rmtree(self.path(step, fp) / CHECKPOINTS, ignore_errors=True)

    def files(self, step: str, fp: str) -> list[tuple[Path, int, str]]:
        """Return (path, bytes, sha256) of every file of a finished step."""
        directory = self.path(step, fp)
        named = read_json(directory / CONTENTS, lambda contents: (contents.get("step"), contents.get("fingerprint")))
        if named != (step, fp):
            raise UserError(f"{directory / CONTENTS} belongs to another step; {again(directory / CONTENTS)}")
        return [(directory / name, *entry) for name, entry in files_of(directory).items()]


def files_of(directory: Path) -> dict[str, tuple[int, str]]:
    """Return file name → (bytes, sha256) of a finished step. Raises UserError naming a damaged list."""

    def take(contents: Any) -> dict[str, tuple[int, str]]:
        return {name: (int(f["bytes"]), str(f["sha256"])) for name, f in contents["files"].items()}

    return read_json(directory / CONTENTS, take)


def made_from(directory: Path, *needed: str) -> dict[str, str]:
    """Return STEP → fingerprint of all that a finished step was made from. Raises UserError naming a damaged file.

    The file is also damaged if it does not name the steps ``needed``.
    """

    def take(contents: Any) -> dict[str, str]:
        found = {str(step): str(fp) for step, fp in contents["provenance"]["fingerprints"].items()}
        return found | {step: found[step] for step in needed}

    return read_json(directory / CONTENTS, take)


def write_records(out: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Write OUT/steps.json: STEP → {status, fingerprint, seconds, …} of each step that the last command on OUT reached."""
    write_json(out / RECORDS, {"format": "gdd-steps/1", "steps": records})


def read_records(out: Path) -> dict[str, dict[str, Any]]:
    """Return what `write_records` wrote; {} if no command has run. Raises UserError naming a damaged file."""

    def take(document: Any) -> dict[str, dict[str, Any]]:
        return {
            step: {
                **r,
                "status": str(r["status"]),
                "fingerprint": str(r["fingerprint"]),
                "seconds": float(r["seconds"]),
            }
            for step, r in document["steps"].items()
        }

    return read_json(out / RECORDS, take, ALONE) if (out / RECORDS).exists() else {}


def clean(directory: Path) -> None:
    """Remove the temporary files of a killed process; nobody else may be writing in ``directory``."""
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
    """Make OUT/<step>/latest a relative link to the finished directory, replaced atomically."""
    directory = out / step
    directory.mkdir(parents=True, exist_ok=True)
    link_atomic(directory / "latest", Path(os.path.relpath(target.resolve(), directory.resolve())))
