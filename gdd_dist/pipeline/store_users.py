"""Who uses a store: STORE/users lists every OUT that ran on it, so that pruning knows what is still needed.

A run needs the targets of its OUT's ``latest`` links and everything they were made from, the steps that its settings plan (a
killed run continues from a ``.partial`` directory), and every directory whose lock is held.
"""

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gdd_dist.config.command_line import settings_of
from gdd_dist.config.settings import Config
from gdd_dist.config.steps import STEPS, fingerprints
from gdd_dist.pipeline.dataset import manifest_of
from gdd_dist.runtime.locks import Lock
from gdd_dist.storage.store import CONTENTS, made_from
from sharding.errors import UserError
from sharding.files import fsync_dir

FILE = "users"
PRECISIONS = ("float32", "bf16", "fp16")
_DIRECTORY = re.compile(r"([0-9a-f]{16})(\..+)?")


def note_user(store: Path, out: Path) -> None:
    """Add OUT to STORE/users, once. It is one short append, so runs that start together keep each other's entries."""
    line = str(out.resolve())
    if line in users(store):
        return
    store.mkdir(parents=True, exist_ok=True)
    with (store / FILE).open("ab") as f:
        f.write(os.fsencode(f"{line}\n"))
        f.flush()
        os.fsync(f.fileno())


def users(store: Path) -> list[str]:
    """Return the absolute paths of all OUTs that ever used the store, in order of first use."""
    path = store / FILE
    return list(dict.fromkeys(os.fsdecode(path.read_bytes()).splitlines())) if path.exists() else []


def store_of(out: Path, config: Config) -> Path:
    """Return the directory in which the run keeps its finished steps."""
    return Path(config.store) if config.store else out


def plans_of(out: Path) -> list[dict[str, str]]:
    """Return every possible plan, STEP → fingerprint, of OUT's settings; empty if these or the data set cannot be read here."""
    try:
        config = settings_of(out)
        manifest = manifest_of(out, config)
    except UserError:
        return []
    precisions = PRECISIONS if config.precision == "auto" else (config.precision,)
    return [fingerprints(config, manifest, precision) for precision in precisions]


def linked(out: Path, store: Path) -> set[tuple[str, str]]:
    """Return (step, fingerprint) of the targets of OUT's ``latest`` links, and of everything they were made from."""
    found = set()
    for step in STEPS[1:]:
        target = (out / step / "latest").resolve()
        if target.parent.parent != store.resolve() or not (target / CONTENTS).exists():
            continue
        found.add((step, target.name))
        before = STEPS[1 : STEPS.index(step)]
        found |= {(name, fp) for name, fp in made_from(target).items() if name in before}
    return found


@dataclass(frozen=True)
class Wanted:
    """What is needed of a store, as (step, fingerprint); listed OUTs that no longer exist; OUTs without settings or data."""

    steps: frozenset[tuple[str, str]]
    gone: tuple[str, ...]
    unplanned: tuple[str, ...]


def wanted(store: Path, out: Path) -> Wanted:
    """Return what any listed OUT, or ``out``, needs."""
    steps, gone, unplanned = set(), [], []
    for name in dict.fromkeys([str(out.resolve()), *users(store)]):
        user = Path(name)
        if not (user / "config.yaml").exists():
            gone.append(name)
            continue
        steps |= linked(user, store)
        plans = plans_of(user)
        steps |= {(step, fp) for plan in plans for step, fp in plan.items()}
        unplanned += [] if plans else [name]
    return Wanted(frozenset(steps), tuple(gone), tuple(unplanned))


@dataclass(frozen=True)
class Directory:
    """A step's directory in a store, finished or not."""

    path: Path
    step: str
    fingerprint: str

    @property
    def lock(self) -> Lock:
        """Return the lock that is held while the step writes the directory."""
        return Lock(self.path.with_name(f"{self.fingerprint}.lock"))

    def bytes(self) -> int:
        """Return its size on disk in bytes."""
        return sum(p.stat().st_size for p in self.path.rglob("*") if p.is_file())


def directories(store: Path) -> Iterator[Directory]:
    """Yield all step directories of a store."""
    for step in STEPS[1:]:
        for path in sorted((store / step).glob("*")):
            match = _DIRECTORY.fullmatch(path.name)
            if match and path.is_dir() and not path.is_symlink():
                yield Directory(path, step, match[1])


def unused(store: Path, out: Path) -> tuple[list[Directory], Wanted]:
    """Return the directories that no run needs, and what is needed. Raises UserError if the store's users are unknown."""
    if not (store / FILE).exists() and store.resolve() != out.resolve():
        what = f"{store / FILE} is missing, so it is not known which other runs use {store}"
        raise UserError(f"{what}; run gdd_dist.train once for each of them")
    found = wanted(store, out)
    idle = [d for d in directories(store) if (d.step, d.fingerprint) not in found.steps and not d.lock.holder()]
    if found.unplanned:  # it is unknown which unfinished directory such a run would continue
        idle = [d for d in idle if d.path.suffix != ".partial"]
    return idle, found


def remove(store: Path, out: Path, directory: Directory) -> bool:
    """Remove a directory unless a run needs it by now. It is renamed first, so that no run sees it half removed."""
    lock = directory.lock
    if lock.try_acquire() is not None:
        return False
    try:
        if (directory.step, directory.fingerprint) in wanted(store, out).steps:
            return False
        trash = directory.path.with_name(f"{directory.fingerprint}.removed")
        if directory.path != trash:
            shutil.rmtree(trash, ignore_errors=True)
            os.rename(directory.path, trash)
            fsync_dir(trash.parent)
        shutil.rmtree(trash)
    finally:
        lock.release()
    return True
