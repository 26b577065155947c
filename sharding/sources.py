"""Where images come from: one function for each kind of SOURCE a user may write.

Those whose samples are pixels are in arrays.py.
"""

import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from sharding import foreign
from sharding.arrays import cifar, digits, mnist
from sharding.cifar import CIFAR10, CIFAR100
from sharding.containers import open_files
from sharding.errors import UserError
from sharding.folders import folder
from sharding.foreign import webdataset
from sharding.layout import Tree
from sharding.listing import Listing, Sample, chosen
from sharding.options import Options
from sharding.progress import Log

_TEXTS = ("wnids.txt", "words.txt", "val/val_annotations.txt")


def tiny_imagenet(argument: str, scratch: Path, _: Options) -> Listing:
    """List Tiny ImageNet in its published layout. Its published val is our test; class ids follow the sorted wnids.

    The published test set, which has no labels, is left out.
    """
    tree = Tree(open_files(argument, scratch))
    root = tree.folder_with("wnids.txt")
    if root is None:
        raise UserError(f"{tree.files.shown} holds no wnids.txt; give Tiny ImageNet in its published layout")
    wnids = sorted({line.strip() for line in _lines(tree, root, "wnids.txt") if line.strip()})
    if not wnids:
        raise UserError(f"wnids.txt in {tree.files.shown} names no class; download it again")
    ids = {wnid: i for i, wnid in enumerate(wnids)}
    train = []
    for wnid, label in ids.items():
        images = tree.images_below(posixpath.join(root, "train", wnid))
        if not images:
            raise UserError(f"class {wnid} has no image in train of {tree.files.shown}; download it again")
        train += [Sample(member, label) for member in images]
    test = _published_val(tree, root, ids)
    words = [line.partition("\t") for line in _lines(tree, root, "words.txt")]
    names = _class_names(wnids, {wnid: text for wnid, tab, text in words if tab})
    used = {s.member.name for s in (*train, *test)} | {posixpath.join(root, text) for text in _TEXTS}
    left_out = tree.left_out(used, root)
    return Listing("tiny-imagenet", names, {"train": train, "test": test}, tree.files, left_out=left_out)


def _published_val(tree: Tree, root: str, ids: dict[str, int]) -> list[Sample]:
    lines = [line.split("\t") for line in _lines(tree, root, "val/val_annotations.txt")]
    annotated = {fields[0]: fields[1].strip() for fields in lines if len(fields) >= 2}
    samples = []
    for member in tree.images_below(posixpath.join(root, "val")):
        wnid = annotated.get(posixpath.basename(member.name), "")
        if wnid not in ids:
            raise UserError(f"{member.name} in {tree.files.shown} is not in val_annotations.txt; download it again")
        samples.append(Sample(member, ids[wnid]))
    if not samples:
        raise UserError(f"{tree.files.shown} has no image in val; give Tiny ImageNet in its published layout")
    return samples


def _lines(tree: Tree, root: str, name: str) -> list[str]:
    member = tree.find(posixpath.join(root, name))
    if member is None:
        raise UserError(f"{tree.files.shown} lacks {name}; give Tiny ImageNet in its published layout")
    try:
        return tree.files.read(member).decode("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {name} in {tree.files.shown} ({error}); download it again") from None


SOURCES: dict[str, Callable[[str, Path, Options], Listing]] = {
    "digits": digits,
    "cifar10:PATH": partial(cifar, CIFAR10),
    "cifar100:PATH": partial(cifar, CIFAR100),
    "mnist:PATH": mnist,
    "tiny-imagenet:PATH": tiny_imagenet,
    "folder:PATH": folder,
    "webdataset:GLOB": webdataset,
}
"""How a user writes a SOURCE → the function that lists it, given what follows the colon and a directory for temporary files."""


def open_source(text: str, scratch: Path, options: Options | None = None, log: Log | None = None) -> Listing:
    """List what SOURCE, as a user writes it, holds. Raises UserError when it is unknown, missing or malformed.

    `log` gets the listing's notes, before anything is refused because of how the source was read.
    """
    options, log = options or Options(), log or (lambda line: None)
    source, argument = parse(expanded(text))
    if options.layout and source is not folder:
        raise UserError("--layout works only with folder: sources; leave it out")
    if options.first_label and source is not webdataset:
        raise UserError("--first-label works only with webdataset: sources; leave it out")
    try:
        listing = source(argument, scratch, options)
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


def places(text: str) -> list[str]:
    """Return the paths that SOURCE names and whose content is read; they need not exist. Raises UserError as `parse` does."""
    source, argument = parse(text)
    if source is webdataset:
        return foreign.places(argument)
    return [argument] if argument else []


def parse(text: str) -> tuple[Callable[[str, Path, Options], Listing], str]:
    """Return what lists SOURCE, and its argument. Raises UserError when it is unknown, or PATH is missing or does not exist."""
    kind, _, argument = text.partition(":")
    usage = next((usage for usage in SOURCES if usage.partition(":")[0] == kind), None)
    if usage is None:
        raise UserError(f"unknown source {text!r}; give one of {' | '.join(SOURCES)}")
    if ":" in usage and not argument:
        raise UserError(f"source {text!r} lacks its path; write {usage}")
    if usage.endswith(":PATH") and not Path(argument).exists():
        raise UserError(f"{argument} does not exist; check the path")
    return SOURCES[usage], argument


def _class_names(wnids: Sequence[str], words: dict[str, str]) -> tuple[str, ...]:
    """Return readable, distinct names: the first synonym, with the wnid if two classes share it."""
    short = {wnid: words.get(wnid, wnid).split(",")[0].strip() or wnid for wnid in wnids}
    often = Counter(short.values())
    return tuple(name if often[name] == 1 else f"{name} ({wnid})" for wnid, name in short.items())
