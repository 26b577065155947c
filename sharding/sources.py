"""Where images come from: one class for each kind of SOURCE a user may write.

Digits and CIFAR, whose samples are pixels, are in arrays.py.
"""

import os
import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sharding.archives import open_files
from sharding.arrays import Cifar10, Cifar100, Digits
from sharding.containers import Files
from sharding.errors import UserError
from sharding.folders import Folder
from sharding.foreign import WebDataset
from sharding.layout import Tree
from sharding.listing import Listing, Sample, Source, chosen
from sharding.mnist import Mnist
from sharding.options import Options
from sharding.progress import Log

_TEXTS = ("wnids.txt", "words.txt", "val/val_annotations.txt")


class TinyImageNet(Source):
    """Tiny ImageNet in its published layout. Its published val is our test; class ids follow the sorted wnids."""

    usage = "tiny-imagenet:PATH"

    def listing(self) -> Listing:
        """List the images; the published test set, which has no labels, is left out."""
        files = open_files(self.argument, self.scratch)
        tree = Tree(files)
        root = tree.folder_with("wnids.txt")
        if root is None:
            raise UserError(f"{files.shown} holds no wnids.txt; give Tiny ImageNet in its published layout")
        wnids = sorted({line.strip() for line in self._lines(files, tree, root, "wnids.txt") if line.strip()})
        if not wnids:
            raise UserError(f"wnids.txt in {files.shown} names no class; download it again")
        ids = {wnid: i for i, wnid in enumerate(wnids)}
        train = []
        for wnid, label in ids.items():
            images = tree.images_below(posixpath.join(root, "train", wnid))
            if not images:
                raise UserError(f"class {wnid} has no image in train of {files.shown}; download it again")
            train += [Sample(member, label) for member in images]
        test = self._published_val(files, tree, root, ids)
        words = [line.partition("\t") for line in self._lines(files, tree, root, "words.txt")]
        names = _class_names(wnids, {wnid: text for wnid, tab, text in words if tab})
        used = {s.member.name for s in (*train, *test)} | {posixpath.join(root, text) for text in _TEXTS}
        left_out = tree.left_out(used, root)
        return Listing("tiny-imagenet", names, {"train": train, "test": test}, files, left_out=left_out)

    def _published_val(self, files: Files, tree: Tree, root: str, ids: dict[str, int]) -> list[Sample]:
        lines = [line.split("\t") for line in self._lines(files, tree, root, "val/val_annotations.txt")]
        annotated = {fields[0]: fields[1].strip() for fields in lines if len(fields) >= 2}
        samples = []
        for member in tree.images_below(posixpath.join(root, "val")):
            wnid = annotated.get(posixpath.basename(member.name), "")
            if wnid not in ids:
                raise UserError(f"{member.name} in {files.shown} is not in val_annotations.txt; download it again")
            samples.append(Sample(member, ids[wnid]))
        if not samples:
            raise UserError(f"{files.shown} has no image in val; give Tiny ImageNet in its published layout")
        return samples

    @staticmethod
    def _lines(files: Files, tree: Tree, root: str, name: str) -> list[str]:
        member = tree.find(posixpath.join(root, name))
        if member is None:
            raise UserError(f"{files.shown} lacks {name}; give Tiny ImageNet in its published layout")
        try:
            return files.read(member).decode("utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {name} in {files.shown} ({error}); download it again") from None


SOURCES: dict[str, type[Source]] = {
    "digits": Digits,
    "cifar10": Cifar10,
    "cifar100": Cifar100,
    "mnist": Mnist,
    "tiny-imagenet": TinyImageNet,
    "folder": Folder,
    "webdataset": WebDataset,
}


def open_source(text: str, scratch: Path, options: Options | None = None, log: Log | None = None) -> Listing:
    """List what SOURCE, as a user writes it, holds. Raises UserError when it is unknown, missing or malformed.

    `log` gets the listing's notes, before anything is refused because of how the source was read.
    """
    options, log, text = options or Options(), log or (lambda line: None), expanded(text)
    source = parse(text)
    if options.layout and source is not Folder:
        raise UserError("--layout works only with folder: sources; leave it out")
    if options.first_label and source is not WebDataset:
        raise UserError("--first-label works only with webdataset: sources; leave it out")
    try:
        listing = source(text.partition(":")[2], scratch, options).listing()
    except UserError as error:
        for note in getattr(error, "__notes__", ()):
            log(note)
        raise
    for note in listing.notes:
        log(note)
    return chosen(listing, options.classes) if options.classes else listing


def expanded(text: str) -> str:
    """Return SOURCE with ``~`` at the beginning of its paths expanded: shells do that only at the beginning of words."""
    kind, colon, argument = text.partition(":")
    starts = r"(^|::|=)(~[^/:,]*)" if kind == "webdataset" else r"(^)(~[^/]*)"
    return kind + colon + re.sub(starts, lambda found: found[1] + os.path.expanduser(found[2]), argument)


def parse(text: str) -> type[Source]:
    """Return the class of SOURCE. Raises UserError when it is unknown, or PATH is missing or does not exist."""
    kind, _, argument = text.partition(":")
    source = SOURCES.get(kind)
    if source is None:
        known = " | ".join(source.usage for source in SOURCES.values())
        raise UserError(f"unknown source {text!r}; give one of {known}")
    if ":" in source.usage and not argument:
        raise UserError(f"source {text!r} lacks its path; write {source.usage}")
    if source.usage.endswith(":PATH") and not Path(argument).exists():
        raise UserError(f"{argument} does not exist; check the path")
    return source


def _class_names(wnids: Sequence[str], words: dict[str, str]) -> tuple[str, ...]:
    """Return readable, distinct names: the first synonym, with the wnid if two classes share it."""
    short = {wnid: words.get(wnid, wnid).split(",")[0].strip() or wnid for wnid in wnids}
    often = Counter(short.values())
    return tuple(name if often[name] == 1 else f"{name} ({wnid})" for wnid, name in short.items())
