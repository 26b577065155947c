"""Who uses a store: STORE/users lists every OUT that ran on it, so that pruning knows what is still wanted.

What a run wants: what its OUT's ``latest`` links show and what that was made from, what its settings plan (a killed run goes on
from a ``.partial`` directory), and whatever a live lock is being written under.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gdd_dist.config import command_line as configuration
from gdd_dist.config.settings import Config
from gdd_dist.config.steps import STEPS
from gdd_dist.pipeline.dataset import manifest_of
from gdd_dist.pipeline.fingerprints import fingerprints
from gdd_dist.runtime.locks import Lock
from gdd_dist.storage.json_files import read_json
from gdd_dist.storage.store import CONTENTS
from sharding.errors import UserError
from sharding.files import fsync_dir

FILE = "users"
PRECISIONS = ("float32", "bf16", "fp16")
_DIRECTORY = re.compile(r"([0-9a-f]{16})(\..+)?")


def note_user(store: Path, out: Path) -> None:
    """Add OUT to STORE/users, once. One short append: runs that start together do not lose each other's line."""
    line = str(out.resolve())
    if line in users(store):
        return
    store.mkdir(parents=True, exist_ok=True)
    with (store / FILE).open("ab") as f:
        f.write(os.fsencode(f"{line}\n"))
        f.flush()
        os.fsync(f.fileno())


def users(store: Path) -> list[str]:
    """The absolute paths of all OUTs that ever used the store, in the order they came."""
    path = store / FILE
    return list(dict.fromkeys(os.fsdecode(path.read_bytes()).splitlines())) if path.exists() else []


def store_of(out: Path, config: Config) -> Path:
    """Where the run keeps its finished steps."""
    return Path(config.store) if config.store else out


def read_run(out: Path) -> Config:
    """The settings that OUT was last started with. Raises UserError for a directory that is no run."""
    if not (out / "config.yaml").exists():
        raise UserError(f"{out} is no run (config.yaml is missing); give the --out of a gdd_dist.train")
    # OUT may have been moved since: what it says of itself counts for less than where it lies.
    return configuration.parse(["--config", str(out / "config.yaml"), "--out", str(out)]).config


def planned(out: Path, config: Config, precision: str) -> dict[str, str] | None:
    """STEP → fingerprint as the run's settings plan it; None where its data set is not there."""
    try:
        manifest = manifest_of(out, config)
    except UserError:
        return None
    return fingerprints(config, manifest, precision if config.precision == "auto" else config.precision)


def plans_of(out: Path) -> list[dict[str, str]]:
    """Every plan that OUT's settings may mean; none where they or the data set cannot be read here."""
    try:
        config = read_run(out)
    except UserError:
        return []
    precisions = PRECISIONS if config.precision == "auto" else (config.precision,)
    return [plan for p in precisions if (plan := planned(out, config, p)) is not None]


def linked(out: Path, store: Path) -> set[tuple[str, str]]:
    """(step, fingerprint) of all that OUT's ``latest`` links show, and of what that was made from."""
    found = set()
    for step in STEPS[1:]:
        target = (out / step / "latest").resolve()
        if target.parent.parent != store.resolve() or not (target / CONTENTS).exists():
            continue
        found.add((step, target.name))
        made_from = read_json(target / CONTENTS)["provenance"]["fingerprints"]
        before = STEPS[1 : STEPS.index(step)]
        found |= {(name, fp) for name, fp in made_from.items() if name in before}
    return found


@dataclass(frozen=True)
class Wanted:
    """What of a store is wanted: (step, fingerprint); OUTs listed that are there no more; OUTs whose settings or data are not."""

    steps: frozenset[tuple[str, str]]
    gone: tuple[str, ...]
    unplanned: tuple[str, ...]


def wanted(store: Path, out: Path) -> Wanted:
    """What any listed OUT, or ``out``, needs."""
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
        """The lock under which the step writes it."""
        return Lock(self.path.with_name(f"{self.fingerprint}.lock"))

    def bytes(self) -> int:
        """Its size on disk."""
        return sum(p.stat().st_size for p in self.path.rglob("*") if p.is_file())


def directories(store: Path) -> Iterator[Directory]:
    """All of them."""
    for step in STEPS[1:]:
        for path in sorted((store / step).glob("*")):
            match = _DIRECTORY.fullmatch(path.name)
            if match and path.is_dir() and not path.is_symlink():
                yield Directory(path, step, match[1])


def unused(store: Path, out: Path) -> tuple[list[Directory], Wanted]:
    """Directories that nobody needs, and what is needed. Raises UserError where it is not known who uses the store."""
    if not (store / FILE).exists() and store.resolve() != out.resolve():
        what = f"{store / FILE} is missing, so it is not known which other runs use {store}"
        raise UserError(f"{what}; run gdd_dist.train once for each of them")
    found = wanted(store, out)
    idle = [d for d in directories(store) if (d.step, d.fingerprint) not in found.steps and not d.lock.holder()]
    if found.unplanned:  # what such a run would go on from is not known
        idle = [d for d in idle if d.path.suffix != ".partial"]
    return idle, found


def remove(store: Path, out: Path, directory: Directory) -> bool:
    """Remove one, unless somebody has come to need it since it was listed. Out of sight first, so that none sees half of it."""
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
