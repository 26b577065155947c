"""WebDataset tars made by other programs: which files form a sample, its image and its label. No code in them is run."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sharding.containers import LARGEST_FILE
from sharding.errors import UserError
from sharding.kinds import unread
from sharding.links import Member
from sharding.listing import Listing, Sample
from sharding.manifest import SPLITS
from sharding.options import Options
from sharding.patterns import mixed, parts, split_patterns, tars
from sharding.tars import BLOCK, Unfit, entries, is_tar, read_at, shown, writable

IMAGES = ("jpg", "jpeg", "png", "webp")
LONGEST_CLS, LONGEST_JSON = 32, 2**20


@dataclass
class Aside:
    """Unused files, counted by kind; and, if samples without an image or a label are to be skipped, the reason for each."""

    skip: bool = False
    left_out: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[int, str]] = field(default_factory=list)


class TarSet:
    """Reads members of several tars at their offsets. It can be sent to another process, which opens the files itself."""

    OPEN = 64

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self._descriptors: dict[int, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "_descriptors": {}}

    def read(self, member: Member) -> bytes:
        """Return a file's content of at most LARGEST_FILE bytes. Raises OSError or ValueError with the reason."""
        if member.size > LARGEST_FILE:
            raise ValueError(f"larger than {LARGEST_FILE >> 20} MiB")
        if member.tar not in self._descriptors:
            if len(self._descriptors) >= self.OPEN:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            self._descriptors[member.tar] = os.open(self.paths[member.tar], os.O_RDONLY)
        return read_at(self._descriptors[member.tar], member.size, member.offset)


def places(argument: str) -> list[str]:
    """Return the paths of all splits; of one with ``**``, which enters directories, the part before."""
    found = [part for pattern in split_patterns(argument).values() for part in parts(pattern)]
    return [part.partition("**")[0] or "." if "**" in part else part for part in found]


def webdataset(argument: str, _: Path, options: Options) -> Listing:
    """List tars in the WebDataset layout: a directory, a pattern with * or {000..123}, or train=PATTERN,test=PATTERN.

    The samples are found by the headers of the tars; images are not read.
    """
    patterns = split_patterns(argument)
    aside = Aside(options.on_error == "skip")
    found = {split: tars(pattern, aside.left_out) for split, pattern in patterns.items()}
    paths = [path for split in SPLITS for path in found.get(split, ())]
    reader, splits = TarSet(paths), dict[str, list[Sample]]()
    if twice := sorted({path for path in paths if paths.count(path) > 1}):
        raise UserError(f"{twice[0]} is named twice; give each tar once")
    number = 0
    for split in [split for split in SPLITS if split in found]:
        splits[split] = []
        for path in found[split]:
            splits[split] += samples(path, number, reader, aside)
            number += 1
        if not splits[split]:
            raise UserError(f"the tars of {split} hold no sample; check {patterns[split]}")
    first = options.first_label
    last = last_label(splits, first)
    if first:
        splits = {split: [Sample(s.member, s.label - first) for s in found] for split, found in splits.items()}
    names = tuple(str(label) for label in range(first, last + 1))
    # The labels in the tars must be those of the data set, because other programs read the tars without the index.
    in_place = tuple(paths) if "=" in argument and len(patterns) > 1 and not first else ()
    name, left_out = _name(patterns), dict(aside.left_out.most_common())
    notes, faults = tuple(mixed(found)), tuple(aside.faults)
    return Listing(name, names, splits, reader, in_place=in_place, left_out=left_out, notes=notes, faults=faults)


def _name(patterns: dict[str, str]) -> str:
    """Return the fixed beginning of the pattern, or the name of the nearest directory that is not named like a split."""
    path = Path(parts(patterns["train"])[0]).absolute()
    stem = path.name if path.is_dir() else re.split(r"[*?\[{]", path.name)[0].removesuffix(".tar")
    names = [stem.strip("-_. "), *(parent.name for parent in path.parents)]
    return writable(next((name for name in names if name and name not in SPLITS), "webdataset"))


def samples(path: Path, tar: int, reader: TarSet, aside: Aside | None = None) -> Iterator[Sample]:
    """Yield the samples of one tar; files and samples that are not used are recorded in `aside`.

    Raises UserError that names the tar, and the key or member, when the tar is malformed.
    """
    aside = aside or Aside()
    try:
        _check_plain(path)
        for key, files in grouped((replace(member, tar=tar) for member in entries(path)), aside.left_out):
            try:
                sample = _sample(path, key, files, reader, aside.left_out)
            except ValueError as error:
                if not aside.skip:
                    raise
                aside.faults.append((tar, f"{shown(path.name)}: {error}"))
            else:
                yield sample
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error}); check its permissions") from None
    except ValueError as error:
        cure = ", or leave it out" if isinstance(error, Unfit) else "; repair it or leave it out"
        raise UserError(f"{path}: {error}{cure}") from None


def grouped(members: Iterator[Member], unused: Counter[str]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Yield (key, extension → file) for consecutive files with one key: the part before the first dot of the file's name.

    Files without a key, as webdataset itself defines it, are left out and counted in `unused`. Raises ValueError for a
    key that occurs again later, or an extension that occurs twice in a sample.
    """
    seen, key, files = set[str](), "", dict[str, Member]()
    for member in members:
        folder, slash, base = member.name.removeprefix("./").rpartition("/")
        stem, dot, extension = base.partition(".")
        if not stem or not dot or (stem.startswith("__") and stem.endswith("__")):
            unused["files without a key"] += 1
            continue
        if (own := folder + slash + stem) != key:
            if files:
                yield key, files
            if own in seen:
                raise ValueError(f"key {shown(own)} occurs twice, with other keys between")
            seen.add(own)
            key, files = own, {}
        if extension.lower() in files:
            raise ValueError(f"key {shown(own)} has two files .{shown(extension.lower())}")
        files[extension.lower()] = member
    if files:
        yield key, files


def _sample(path: Path, key: str, files: dict[str, Member], reader: TarSet, unused: Counter[str]) -> Sample:
    images = [extension for extension in IMAGES if extension in files]
    if len(images) != 1:
        found = f"{len(images)} images" if images else "no image"
        raise ValueError(f"key {shown(key)} has {found} among its files .{', .'.join(map(shown, files))}")
    image = files[images[0]]
    if image.size == 0:
        raise ValueError(f"key {shown(key)} has an empty image")
    label, read = _label(key, files, reader), (images[0], "cls" if "cls" in files else "json")
    unused.update(f".{shown(extension)} files" for extension in files if extension not in read)
    return Sample(replace(image, name=f"{path.name}: {shown(image.name)}"), label)


def _label(key: str, files: dict[str, Member], reader: TarSet) -> int:
    """The class number in .cls, else that of `label` in .json."""
    if "cls" not in files and "json" not in files:
        raise ValueError(f"key {shown(key)} has no label (.cls, or `label` in .json)")
    extension, most = ("cls", LONGEST_CLS) if "cls" in files else ("json", LONGEST_JSON)
    entry = files[extension]
    if entry.size > most:
        raise ValueError(f"key {shown(key)} has a .{extension} of {entry.size} bytes, which is too long for a label")
    content = reader.read(entry)
    value: Any = content.decode("ascii", "replace").strip()
    if extension == "json":
        try:
            document = json.loads(content)
        except (ValueError, RecursionError):
            raise ValueError(f"key {shown(key)} has a .json file that is not valid JSON") from None
        if not isinstance(document, dict) or "label" not in document:
            raise ValueError(f"key {shown(key)} has no label (.cls, or `label` in .json)")
        value = document["label"] if not isinstance(document["label"], bool) else None
    if not re.fullmatch(r"[0-9]{1,9}", str(value)):
        raise ValueError(f"key {shown(key)} has the label {shown(str(value))}, which is not a class number")
    return int(value)


def last_label(splits: dict[str, list[Sample]], first: int) -> int:
    """Return the largest label of train. Raises UserError for a label that cannot be a class, or if none is `first`."""
    least, most = (bound(splits["train"], key=lambda sample: sample.label) for bound in (min, max))
    if least.label < first:
        raise UserError(f"{least.member.name} has the label {least.label}, less than --first-label {first}; lower that")
    if most.label - first >= len(splits["train"]):
        cure = "but train has fewer images than that; check the label"
        raise UserError(f"{most.member.name} has the label {most.label}, {cure}")
    if least.label > first == 0:
        cure = f"give --first-label {least.label}, which makes new tars with labels from 0"
        raise UserError(f"labels begin at {least.label}, not at 0; {cure}")
    for split, members in splits.items():
        for s in members:
            if not first <= s.label <= most.label:
                what = f"{s.member.name} has the label {s.label}, which no image of train has"
                raise UserError(f"{what}; check {split}")
    return most.label


def _check_plain(path: Path) -> None:
    with path.open("rb") as stream:
        head = stream.read(BLOCK)
    if not is_tar(head) and (what := unread(head, path.name)):
        raise Unfit(f"it is {what}")
    if not head:
        raise ValueError("it is empty")
