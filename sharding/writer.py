"""A build: source → splits → shards → manifest. Parallel, atomic, resumable; the same bytes for any worker count.

DEST/build.json says what is being built, or was built. During the build, DEST/.build/ holds temporary files and a record
of each finished shard. The manifest is written last: a directory without one is not a data set.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import features

from sharding.encode import WORK, Written, finished_shard, inspect_all, mean_and_std, write_shard
from sharding.errors import UserError
from sharding.files import exclusive_lock, fsync_dir, remove_temporaries, write_atomic
from sharding.images import Seen
from sharding.listing import SCRATCH, Listing
from sharding.manifest import BUILD_FILE, FILE, SPLITS, Manifest, SplitInfo
from sharding.options import Options
from sharding.plan import Plan, about, check_splits, make_plan
from sharding.pool import Pool, available_cores
from sharding.progress import Log, Progress
from sharding.shards import verify_shard
from sharding.sources import expanded, open_source, places
from sharding.tars import shown, shown_whole

BUILD_FORMAT = "gdd-build/1"
CHUNK = 128
# Below this many images for each worker, starting the worker takes longer than its share of the work.
IMAGES_PER_WORKER = 2000


@dataclass(frozen=True)
class Built:
    """The result of a build. `reused`: the data set existed already. `skipped`: number of unreadable images left out."""

    manifest: Manifest
    reused: bool
    skipped: int


def build(
    source: str, dest: Path | str, options: Options | None = None, *, log: Log | None = None, bar: bool = False
) -> Built:
    """Build the data set of `source` (as on the command line) in `dest`, or continue an unfinished build of it.

    `log` gets lines of text, `bar` shows progress bars on stderr. Raises UserError for anything the user can fix, and
    OSError when the disk is full or not writable; the next run uses the shards that were finished by then.
    """
    options, log, dest, source = options or Options(), log or (lambda line: None), Path(dest), expanded(source)
    check_destination(dest, places(source))
    work, fresh = dest / WORK, not dest.exists()
    work.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(work / "lock", f"another build is writing {dest}; wait for it"):
        remove_temporaries(dest)
        try:
            built = _build(source, dest, options, log, bar)
        finally:
            _clean(dest, fresh)
    return built


def _build(source: str, dest: Path, options: Options, log: Log, bar: bool) -> Built:
    listing = open_source(source, dest / WORK, options, log)
    check_splits(listing, options)
    # Shards made by other versions of these libraries may have other bytes.
    versions = {name: version(name) for name in ("numpy", "pillow", "simplejpeg", "webdataset")}
    versions |= {"zlib": str(features.version("zlib"))} | listing.versions
    images = sum(len(samples) for samples in listing.splits.values())
    workers = min(options.workers or available_cores(), images if options.workers else -(-images // IMAGES_PER_WORKER))
    with Pool(workers, listing.reader) as pool:
        with Progress("reading", images, log=log, bar=bar) as progress:
            seen, skipped = _inspect(pool, listing, options, progress, log)
        plan = make_plan(listing, seen, options)
        for note in about(plan):
            log(note)
        if (dest / FILE).exists():
            return Built(_existing(dest, plan), True, len(skipped))
        if listing.in_place and (anew := sum(shard.tar is None for shard in plan.shards)):
            what = f"{anew} of {len(plan.shards)} tars are written again"
            log(f"{what}, because some of their images are converted or skipped")
        elif listing.in_place:
            log("the tars stay where they are; only indexes are written")
        _prepare(dest, source, plan, versions, skipped)
        written = _write(pool, dest, plan, log, bar)
    manifest = _manifest(plan, written, versions, _left_out(listing, seen))
    if flat := [str(c) for c, s in enumerate(manifest.std, 1) if s == 1.0]:
        log(f"channel {', '.join(flat)} is constant in train: its standard deviation is set to 1")
    manifest.save(dest)
    return Built(manifest, False, len(skipped))


def _inspect(
    pool: Pool, listing: Listing, options: Options, progress: Progress, log: Log
) -> tuple[list[Seen | None], list[str]]:
    """Inspect every image in the order of the listing; return what was seen (None: left out), and why images were left out."""
    members = [sample.member for samples in listing.splits.values() for sample in samples]
    chunks = [members[start : start + CHUNK] for start in range(0, len(members), CHUNK)]
    look_at = partial(inspect_all, values=options.value_range)
    results = [look for chunk in pool.map(look_at, chunks, progress) for look in chunk]
    named = [(shown_whole(m.name), look) for m, look in zip(members, results, strict=True) if isinstance(look, str)]
    skipped = [reason for _, reason in listing.faults] + [f"{name}: {why}" for name, why in named]
    if named and options.on_error == "stop":
        more = f", and {len(named) - 1} more" if len(named) > 1 else ""
        name, reason = named[0]
        raise UserError(f"cannot read {name} ({reason}){more}; repair or remove it, or give --on-error skip")
    for line in skipped:
        log(f"skipped {line}")
    return [None if isinstance(look, str) else look for look in results], skipped


def _write(pool: Pool, dest: Path, plan: Plan, log: Log, bar: bool) -> list[Written]:
    done = [finished_shard(dest, shard) for shard in plan.shards]
    missing = [shard for shard, written in zip(plan.shards, done, strict=True) if written is None]
    if reused := len(done) - len(missing):
        log(f"continuing an unfinished build: {reused} of {len(done)} shards are finished")
    write = partial(write_shard, directory=dest, target=plan.target)
    with Progress("writing", sum(len(shard.samples) for shard in missing), log=log, bar=bar) as progress:
        new = iter(pool.map(write, missing, progress))
    return [written or next(new) for written in done]


def check_destination(dest: Path, sources: Sequence[str]) -> None:
    """Raise UserError when `dest` lies in a directory of `sources`, or cannot be a directory, or holds what is not ours."""
    try:
        real, there = dest.resolve(), dest.exists()
        first = next(path for path in (dest, *dest.absolute().parents) if os.path.lexists(path))
    except PermissionError:
        raise
    except (OSError, RuntimeError) as error:  # a name that is too long, or links in a circle
        why = getattr(error, "strerror", "") or error
        raise UserError(f"{shown(str(dest))} cannot be a directory ({why}); choose another DEST") from None
    for path in sources:
        if Path(path).is_dir() and real.is_relative_to(Path(path).resolve()):
            raise UserError(f"{dest} lies inside the source {path}; choose another DEST")
    if not first.is_dir():
        what = "a link that leads nowhere" if not first.exists() else "not a directory"
        raise UserError(f"{first} is {what}; choose another DEST")
    if not there:
        return
    names = {path.name for path in dest.iterdir()} - {WORK}
    if (dest / BUILD_FILE).exists():
        names -= {BUILD_FILE, FILE, *SPLITS}
    names = {name for name in names if not name.startswith(f".{BUILD_FILE}.") and not name.startswith(f".{FILE}.")}
    if names:
        what = "a data set that was built elsewhere" if FILE in names else min(names)
        raise UserError(f"{dest} already holds {what}; choose an empty or a new DEST")


def _existing(dest: Path, plan: Plan) -> Manifest:
    """Return the manifest of a finished build. Raises UserError when it was built by another plan or is damaged."""
    manifest = Manifest.load(dest)
    if _state(dest).get("plan") != plan.fingerprint:
        raise UserError(f"{dest} already holds a different finished data set ({manifest.name}); choose another DEST")
    for split in manifest.splits.values():
        for shard in split.shards:
            verify_shard(dest, shard)
    return manifest


def _prepare(dest: Path, source: str, plan: Plan, versions: dict[str, str], skipped: list[str]) -> None:
    """Record what is being built; remove the files of an unfinished build of something else."""
    state = _state(dest)
    if state.get("plan") != plan.fingerprint or state.get("versions") != versions:
        for record in (dest / WORK).glob("*.json"):
            record.unlink()
        for split in SPLITS:
            if (dest / split).exists():
                shutil.rmtree(dest / split)
        document: dict[str, object] = {"format": BUILD_FORMAT, "source": source, "plan": plan.fingerprint}
        document |= {"versions": versions, "skipped": skipped}
        write_atomic(dest / BUILD_FILE, json.dumps(document, indent=1).encode() + b"\n")
    wanted = {dest / shard.file for shard in plan.shards}
    for split in sorted({shard.split for shard in plan.shards}):
        (dest / split).mkdir(exist_ok=True)
        remove_temporaries(dest / split)
    for path in dest.glob("*/*.tar"):
        if path not in wanted:
            path.unlink()
    fsync_dir(dest)


def _state(dest: Path) -> dict[str, object]:
    try:
        state = json.loads((dest / BUILD_FILE).read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError:
        raise UserError(f"{dest / BUILD_FILE} is damaged; choose another DEST") from None
    return state if isinstance(state, dict) and state.get("format") == BUILD_FORMAT else {}


def _left_out(listing: Listing, seen: list[Seen | None]) -> dict[str, int]:
    counts = {"unreadable images": seen.count(None), "samples without image or label": len(listing.faults)}
    counts["further pages or frames"] = sum(look.further for look in seen if look)
    return {what: count for what, count in counts.items() if count} | listing.left_out


def _manifest(plan: Plan, written: list[Written], versions: dict[str, str], left_out: dict[str, int]) -> Manifest:
    splits, size = {}, (plan.target.height, plan.target.width, plan.target.channels)
    for split in SPLITS:
        pairs = [(p, w) for p, w in zip(plan.shards, written, strict=True) if p.split == split]
        labels = np.array([sample.label for shard, _ in pairs for sample in shard.samples], np.int64)
        counts = tuple(np.bincount(labels, minlength=len(plan.classes)).tolist())
        splits[split] = SplitInfo(len(labels), counts, tuple(w.info for _, w in pairs))
        if split == "train":
            pixels = len(labels) * size[0] * size[1]
            mean, std = mean_and_std(np.sum([(w.sums, w.squares) for _, w in pairs], axis=0), pixels)
    return Manifest(plan.name, plan.classes, *size, mean, std, versions, splits, left_out)


def _clean(dest: Path, fresh: bool) -> None:
    """Remove temporary files; keep the shard records of an unfinished build, but nothing of one that never began."""
    work = dest / WORK
    if (dest / BUILD_FILE).exists() and not (dest / FILE).exists():
        for name in SCRATCH:
            (work / name).unlink(missing_ok=True)
        return
    shutil.rmtree(work)
    if fresh and not any(dest.iterdir()):
        dest.rmdir()
