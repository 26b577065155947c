"""Directories of images, one for each class, in one directory or in one for each split."""

import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from sharding.containers import base_name, open_files
from sharding.errors import UserError
from sharding.layout import Tree, summary
from sharding.listing import Listing, Sample, composed
from sharding.manifest import SPLITS
from sharding.options import Options
from sharding.tars import shown, writable

_NAMES = {"train": "train(?:ing)?|trn", "val": "val(?:id(?:ation)?)?|dev", "test": "test(?:ing)?|tst"}
_TAIL = r"(?:[\s._-]*(?:set|data|images|split))?"
_WORD = re.compile(r"[^\W\d_]+")
_SPLIT_NAMES = {split: re.compile(f"(?:{names}){_TAIL}") for split, names in _NAMES.items()}


def split_of(name: str) -> str | None:
    """Return the split that a directory of this name stands for, or None; upper and lower case are not distinguished."""
    return next((split for split, names in _SPLIT_NAMES.items() if names.fullmatch(name.casefold())), None)


def split_in(name: str) -> str | None:
    """Return the split that one word of a longer name stands for, as in ``seg_train`` or ``val2017``; None if words disagree."""
    found = {split for word in _WORD.findall(name) if (split := split_of(word))}
    return found.pop() if len(found) == 1 else None


def folder(argument: str, scratch: Path, options: Options) -> Listing:
    """List PATH/{train,val,test}/CLASS/… or PATH/CLASS/…; class ids follow the sorted names.

    A single top-level directory is entered. Raises UserError; its notes say how the directories were read.
    """
    tree = Tree(open_files(argument, scratch))
    root = _entered_alone(tree, "", split_of)  # one class is not enough, so that a single directory is none
    where, notes = _splits(tree, root, options.layout)
    try:
        return _listed(base_name(argument), tree, root, where, notes)
    except UserError as error:
        for note in notes:
            error.add_note(note)
        raise


def _listed(name: str, tree: Tree, root: str, where: dict[str, str], notes: list[str]) -> Listing:
    folders = {split: _classes(tree, folder) for split, folder in where.items()}
    # A class is named like its directory in train; a name found in several Unicode forms takes the composed form.
    train = folders.get("train", {})
    names = {key: writable(raws[0]) if len(raws) == 1 else key for key, raws in train.items()}
    if len(names) < 2:
        found = f"only the class {shown(*names.values())}" if names else "no class directory"
        held = summary(tree.left_out((), root))
        there = f" (found: {held})" if held else ""
        cure = f"lay it out as PATH/CLASS/IMAGE or PATH/train/CLASS/IMAGE{there}"
        raise UserError(f"{tree.files.shown} holds {found}; {cure}")
    ordered = sorted(names, key=lambda key: names[key])
    splits = {split: _samples(tree, where[split], ordered, found) for split, found in folders.items()}
    used = {sample.member.name for samples in splits.values() for sample in samples}
    notes = [*notes, *_about_names(folders, names)]
    if taken := len(used & tree.by_content):
        notes.append(f"images recognized by their first bytes, because their names have no image suffix: {taken:,}")
    classes = tuple(names[key] for key in ordered)
    left_out = tree.left_out(used, root)
    return Listing(name, classes, splits, tree.files, left_out=left_out, notes=tuple(notes))


def _splits(tree: Tree, root: str, layout: str | None) -> tuple[dict[str, str], list[str]]:
    """Return the directory of each split, and notes for the user if the directories can be read in two ways."""
    names = tree.folders(root)
    # A class may also be named train; its directory then holds images, while a split's directory holds directories.
    like = {name: split for name in names if (split := split_of(name))}
    shaped = {name: split for name, split in like.items() if tree.folders(posixpath.join(root, name))}
    if layout == "splits" and "train" not in shaped.values():
        shaped = _loosely(tree, root)
    others = [n for n in names if n not in like and tree.images_below(posixpath.join(root, n))]
    if layout == "classes":
        return {"train": root}, []
    if layout is None and not shaped:
        return ({"train": root}, _doubts(tree, root)) if len(like) < len(names) else ({}, [])
    notes, found = [], few(shaped)
    if layout is None and not set(shaped) <= set(SPLITS):
        notes = [f"{found} are read as splits; --layout classes reads them as classes"]
    if layout is None and others:
        rest = few(others)
        if not _agree(tree, root, shaped):
            note = f"{found} and {rest} are read as classes; --layout splits reads {found} as splits"
            return {"train": root}, [note]
        notes = [f"{found} are read as splits, {rest} left out; --layout classes reads all of them as classes"]
    called: dict[str, str] = {}
    for name, split in shaped.items():
        if split in called:
            both = f"{shown(called[split])} and {shown(name)} of {tree.files.shown}"
            raise UserError(f"{both} are both read as {split}; join them, or give --layout classes")
        called[split] = name
    if "train" not in called:
        found = " and ".join(shown(called[s]) for s in SPLITS if s in called) or "no split"
        raise UserError(f"{tree.files.shown} has {found} but no train; add PATH/train/CLASS/IMAGE")
    inner = _entered(tree, root, shaped)
    return {split: inner[called[split]] for split in SPLITS if split in called}, notes


def _entered_alone(tree: Tree, folder: str, stop: Callable[[str], object]) -> str:
    """Enter a directory as long as it is the only one, holds directories, and `stop` is not true of its name; return the last."""
    while len(names := tree.folders(folder)) == 1 and not stop(names[0]):
        if not tree.folders(inner := posixpath.join(folder, names[0])):
            break
        folder = inner
    return folder


def _agree(tree: Tree, root: str, shaped: dict[str, str]) -> bool:
    """Whether directories named like splits are splits: train and at least one more, without classes that train lacks."""
    found: dict[str, set[str]] = defaultdict(set)
    for name, folder in _entered(tree, root, shaped).items():
        found[shaped[name]] |= set(_classes(tree, folder))
    return len(found) > 1 and "train" in found and all(classes <= found["train"] for classes in found.values())


def _entered(tree: Tree, root: str, shaped: dict[str, str]) -> dict[str, str]:
    """Name of a split's directory → the directory of its classes: a single directory in it that is no class is entered."""
    found, known = dict[str, str](), set[str]()
    for name in sorted(shaped, key=lambda name: shaped[name] != "train"):
        found[name] = folder = _entered_alone(tree, posixpath.join(root, name), lambda one: composed(one) in known)
        if shaped[name] == "train":
            known.update(_classes(tree, folder))
    return found


def _loosely(tree: Tree, root: str) -> dict[str, str]:
    """Directory that holds directories and has the name of a split as one word of its name → the split."""
    found = {name: split for name in tree.folders(root) if (split := split_in(name))}
    return {name: split for name, split in found.items() if tree.folders(posixpath.join(root, name))}


def _doubts(tree: Tree, root: str) -> list[str]:
    """Return notes for the user if directories that are read as classes may be splits, or hold splits."""
    filled = [name for name in tree.folders(root) if _filled(tree, posixpath.join(root, name))]
    notes, cure = [], "for splits, lay them out as PATH/train/CLASS/IMAGE and PATH/test/CLASS/IMAGE"
    if like := [name for name in filled if split_of(name)]:
        notes.append(f"{few(like)}: read as classes, though called like splits; {cure}")
    if hold := {name: parts for name in filled if (parts := _later_splits(tree, posixpath.join(root, name)))}:
        what = f"{few(hold)}: read as classes, with all images of {few(sorted(set().union(*hold.values())))} in them"
        enter = f"give folder:PATH/{shown(posixpath.join(root, *hold))}, or " if len(hold) == 1 else ""
        notes.append(f"{what}; {enter}{cure}")
    elif alike := _alike(tree, root, filled):
        loose = {name: split for name, split in _loosely(tree, root).items() if name in alike}
        if len({*loose.values()}) == len(loose) > 1 and "train" in loose.values():
            read = ", ".join(f"{shown(name)} as {split}" for name, split in loose.items())
            cure = f"--layout splits reads {read}"
        notes.append(f"{few(alike)}: read as classes, though they hold directories of the same names; {cure}")
    return notes


def _later_splits(tree: Tree, folder: str) -> set[str]:
    """Names of directories below one that hold images and are called like val or test; not train, which may be a vehicle."""
    below = [inner for inner in tree.walk(folder) if inner != folder and _filled(tree, inner)]
    return {name for name in map(posixpath.basename, below) if split_of(name) in ("val", "test")}


def _filled(tree: Tree, folder: str) -> bool:
    return any(map(tree.images, tree.walk(folder)))


def _alike(tree: Tree, root: str, names: list[str]) -> list[str]:
    """Return those directories that have the names of two or more directories in them in common with others."""
    inner = _entered(tree, root, dict.fromkeys(names, ""))
    held = {n: [c for c in tree.folders(folder) if _filled(tree, f"{folder}/{c}")] for n, folder in inner.items()}
    often = Counter(name for found in held.values() for name in found)
    return [name for name, found in held.items() if sum(often[inner] > 1 for inner in found) > 1]


def _classes(tree: Tree, folder: str) -> dict[str, list[str]]:
    """Class → its directories. Names that differ only in their Unicode form are one class."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in tree.folders(folder):
        found[composed(name)].append(name)
    return found


def _samples(tree: Tree, folder: str, ordered: list[str], found: dict[str, list[str]]) -> list[Sample]:
    if unknown := sorted(set(found) - set(ordered)):
        where = f"{folder} of {tree.files.shown}"
        raise UserError(f"class {shown(unknown[0])} is in {where} but not in train; remove or add it")
    samples = []
    for label, key in enumerate(ordered):
        below = [posixpath.join(folder, name) for name in found.get(key, ())]
        images = [member for inner in below for member in tree.images_below(inner)]
        if below and not images:
            held = summary(tree.left_out((), below=below[0]))
            but = f" (but {held})" if held else ""
            where = f"{shown(below[0])} in {tree.files.shown}"
            raise UserError(f"class {shown(key)} is empty: {where} holds no image{but}; fill or remove it")
        samples += [Sample(member, label) for member in images]
    return samples


def _about_names(folders: dict[str, dict[str, list[str]]], names: dict[str, str]) -> list[str]:
    """Return notes for the user on class names that are written with escapes, and on names joined into one class."""
    notes, raws = [], {raw for found in folders.values() for same in found.values() for raw in same}
    if odd := sorted({writable(raw) for raw in raws if writable(raw) != raw}):
        notes.append(f"class names that are not UTF-8 are written with escaped bytes such as \\xe9: {few(odd)}")
    if joined := [key for key in names if len({raw for found in folders.values() for raw in found.get(key, ())}) > 1]:
        notes.append(f"class names that differ only in their Unicode form are one class: {few(joined)}")
    return notes


def few(names: Iterable[str], most: int = 3) -> str:
    """Return the first names, made fit to be printed, and how many there are if there are more."""
    names = list(names)
    return ", ".join(map(shown, names[:most])) + (f", … ({len(names)})" if len(names) > most else "")
