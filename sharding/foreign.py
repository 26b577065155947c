"""WebDataset tars that others made: which files make a sample, its image and its label. Nothing is unpickled, nothing is run."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from sharding.archives import LARGEST_FILE, Member, TarMember
from sharding.errors import UserError
from sharding.listing import Listing, Sample, Source
from sharding.manifest import SPLITS
from sharding.tars import Entry, entries, shown

IMAGES = ("jpg", "jpeg", "png", "webp")
LONGEST_CLS, LONGEST_JSON = 32, 2**20
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_SPLIT = re.compile(rf",(?=(?:{'|'.join(SPLITS)})=)")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class TarSet:
    """Reads members of several tars at their offsets. An object can be sent to another process, which opens the files itself."""

    OPEN = 64

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self._descriptors: dict[int, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "_descriptors": {}}

    def read(self, member: Member) -> bytes:
        """Return a file's content of at most LARGEST_FILE bytes. Raises OSError or ValueError with the reason."""
        assert isinstance(member, TarMember)
        if member.size > LARGEST_FILE:
            raise ValueError(f"larger than {LARGEST_FILE >> 20} MiB")
        if member.tar not in self._descriptors:
            if len(self._descriptors) >= self.OPEN:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            self._descriptors[member.tar] = os.open(self.paths[member.tar], os.O_RDONLY)
        content = os.pread(self._descriptors[member.tar], member.size, member.offset)
        if len(content) != member.size:
            raise ValueError("the archive ends before it")
        return content


class WebDataset(Source):
    """Tars in the WebDataset layout: a directory, a pattern with * or {000..123}, or train=PATTERN,test=PATTERN."""

    usage = "webdataset:GLOB"

    def listing(self) -> Listing:
        """List the samples of all tars, by their headers; images are not read."""
        patterns = split_patterns(self.argument)
        found = {split: tars(pattern) for split, pattern in patterns.items()}
        paths = [path for split in SPLITS for path in found.get(split, ())]
        reader, splits, number = TarSet(paths), dict[str, list[Sample]](), 0
        if twice := sorted({path for path in paths if paths.count(path) > 1}):
            raise UserError(f"{twice[0]} is named in two places; give each tar once")
        for split in SPLITS:
            for path in found.get(split, ()):
                splits.setdefault(split, []).extend(samples(path, number, reader))
                number += 1
            if split in found and not splits[split]:
                raise UserError(f"the tars of {split} hold no sample; check {patterns[split]}")
        classes = count_classes(splits)
        names = tuple(str(label) for label in range(classes))
        in_place = tuple(paths) if "=" in self.argument and len(patterns) > 1 else ()
        return Listing(self._name(patterns), names, splits, reader, in_place=in_place)

    @staticmethod
    def _name(patterns: dict[str, str]) -> str:
        """What stands before the part of a pattern that varies, or the nearest directory whose name says more than its split."""
        path = Path(patterns["train"]).absolute()
        stem = path.name if path.is_dir() else re.split(r"[*?\[{]", path.name)[0].removesuffix(".tar")
        names = [stem.strip("-_. "), *(parent.name for parent in path.parents)]
        return next((name for name in names if name and name not in SPLITS), "webdataset")


def split_patterns(argument: str) -> dict[str, str]:
    """SPLIT → pattern, from ``train=PATTERN,test=PATTERN`` or one pattern (train). Raises UserError for what is none."""
    parts = _SPLIT.split(argument)
    if not any(part.startswith(f"{split}=") for part in parts for split in SPLITS):
        return {"train": _local(argument)}
    pairs = [part.partition("=") for part in parts]
    patterns = {split: _local(pattern) for split, _, pattern in pairs}
    if "train" not in patterns or len(patterns) < len(parts) or not all(patterns.values()):
        raise UserError(f"webdataset:{argument} does not name each split once; write webdataset:train=GLOB,test=GLOB")
    return patterns


def _local(pattern: str) -> str:
    """Refuse commands and URLs: stock webdataset hands pipe:, and many other schemes, to a shell."""
    pattern = pattern.strip()
    if pattern.lower().startswith("pipe:") or pattern.startswith(("|", "!")):
        raise UserError(f"{shown(pattern)} is a command, and commands are never run; give the paths of tar files")
    if _SCHEME.match(pattern) or "://" in pattern:
        raise UserError(f"{shown(pattern)} is a URL; copy the tars here and give their paths")
    return pattern


def tars(pattern: str) -> list[Path]:
    """The tars of a directory, or those that a pattern with braces and asterisks names, sorted within each brace.

    Raises UserError where there are none, or one that is named is missing.
    """
    if Path(pattern).is_dir():
        found = sorted(Path(pattern).glob("*.tar"))
        if not found:
            raise UserError(f"{pattern} holds no .tar; give a directory of tars or a pattern")
        return [path.absolute() for path in found]
    paths = []
    try:
        plain = list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"{pattern} is not a pattern ({error}); write it as shards-{{000..123}}.tar") from None
    for name in plain:
        matches = sorted(glob(name)) if any(c in name for c in "*?[") and not Path(name).exists() else [name]
        if not matches:
            raise UserError(f"{name} matches no file; check the pattern")
        paths += [Path(match) for match in matches]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} does not exist; check the pattern")
    return [path.absolute() for path in paths]


def samples(path: Path, tar: int, reader: TarSet) -> Iterator[Sample]:
    """Yield the samples of one tar. Raises UserError that names the tar, and the key or member, where it is not as it should be."""
    try:
        _check_plain(path)
        for key, files in grouped(entries(path)):
            yield _sample(path, tar, key, files, reader)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error}); check its permissions") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}; mend it or leave it out") from None


def grouped(members: Iterator[Entry]) -> Iterator[tuple[str, dict[str, Entry]]]:
    """Yield (key, extension → file) of neighbours that share a key: what stands before the first dot of the file's name.

    Files without a key, as stock webdataset has it, are left out. Raises ValueError for a key that comes again, or an
    extension that comes twice.
    """
    seen, key, files = set[str](), "", dict[str, Entry]()
    for entry in members:
        folder, slash, base = entry.name.removeprefix("./").rpartition("/")
        stem, dot, extension = base.partition(".")
        if not stem or not dot or (stem.startswith("__") and stem.endswith("__")):
            continue
        if (own := folder + slash + stem) != key:
            if files:
                yield key, files
            if own in seen:
                raise ValueError(f"key {shown(own)} comes twice, with others between")
            seen.add(own)
            key, files = own, {}
        if extension.lower() in files:
            raise ValueError(f"key {shown(own)} has two files .{shown(extension.lower())}")
        files[extension.lower()] = entry
    if files:
        yield key, files


def _sample(path: Path, tar: int, key: str, files: dict[str, Entry], reader: TarSet) -> Sample:
    images = [extension for extension in IMAGES if extension in files]
    if len(images) != 1:
        found = f"{len(images)} images" if images else "no image"
        raise ValueError(f"key {shown(key)} has {found} among its files .{', .'.join(map(shown, files))}")
    image = files[images[0]]
    if image.size == 0:
        raise ValueError(f"key {shown(key)} has an empty image")
    member = TarMember(f"{path.name}: {shown(image.name)}", image.size, image.offset, tar)
    return Sample(member, _label(tar, key, files, reader))


def _label(tar: int, key: str, files: dict[str, Entry], reader: TarSet) -> int:
    """The class number in .cls, else that of `label` in .json."""
    if "cls" not in files and "json" not in files:
        raise ValueError(f"key {shown(key)} has no label (.cls, or `label` in .json)")
    extension, most = ("cls", LONGEST_CLS) if "cls" in files else ("json", LONGEST_JSON)
    entry = files[extension]
    if entry.size > most:
        raise ValueError(f"key {shown(key)} has a .{extension} of {entry.size} bytes, which is no label")
    content = reader.read(TarMember(entry.name, entry.size, entry.offset, tar))
    value: Any = content.decode("ascii", "replace").strip()
    if extension == "json":
        try:
            document = json.loads(content)
        except (ValueError, RecursionError):
            raise ValueError(f"key {shown(key)} has a .json that is none") from None
        if not isinstance(document, dict) or "label" not in document:
            raise ValueError(f"key {shown(key)} has no label (.cls, or `label` in .json)")
        value = document["label"] if not isinstance(document["label"], bool) else None
    if not re.fullmatch(r"[0-9]{1,9}", str(value)):
        raise ValueError(f"key {shown(key)} has the label {shown(str(value))}, which is no class number")
    return int(value)


def count_classes(splits: dict[str, list[Sample]]) -> int:
    """One more than the largest label of train. Raises UserError for a label that cannot be a class."""
    most = max(splits["train"], key=lambda sample: sample.label)
    if most.label >= len(splits["train"]):
        raise UserError(
            f"{most.member.name} has the label {most.label}, but there are fewer images than that; check it"
        )
    for split, members in splits.items():
        if wrong := next((s for s in members if s.label > most.label), None):
            raise UserError(
                f"{wrong.member.name} has the label {wrong.label}, which no image of train has; check {split}"
            )
    return most.label + 1


def _check_plain(path: Path) -> None:
    with path.open("rb") as stream:
        head = stream.read(8)
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            raise ValueError(f"it is compressed ({name}), so its samples cannot be reached at random; decompress it")
    if not head:
        raise ValueError("it is empty")
