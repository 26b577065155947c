"""Where images come from: one class for each kind of SOURCE a user may write.

Digits and CIFAR, whose samples are pixels, are in arrays.py.
"""

import posixpath
from collections.abc import Sequence
from pathlib import Path

from sharding.archives import Files, base_name, open_files
from sharding.arrays import Cifar10, Cifar100, Digits
from sharding.errors import UserError
from sharding.foreign import WebDataset
from sharding.layout import Tree
from sharding.listing import Listing, Sample, Source
from sharding.manifest import SPLITS


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
            raise UserError(f"wnids.txt in {files.shown} names no class; get it again")
        ids = {wnid: i for i, wnid in enumerate(wnids)}
        train = []
        for wnid, label in ids.items():
            images = tree.images_below(posixpath.join(root, "train", wnid))
            if not images:
                raise UserError(f"class {wnid} has no image in train of {files.shown}; get it again")
            train += [Sample(member, label) for member in images]
        test = self._published_val(files, tree, root, ids)
        words = [line.rstrip("\n").split("\t", 1) for line in self._lines(files, tree, root, "words.txt")]
        names = _class_names(wnids, {pair[0]: pair[1] for pair in words if len(pair) == 2})
        return Listing("tiny-imagenet", names, {"train": train, "test": test}, files)

    def _published_val(self, files: Files, tree: Tree, root: str, ids: dict[str, int]) -> list[Sample]:
        annotated = {}
        for line in self._lines(files, tree, root, "val/val_annotations.txt"):
            fields = line.split("\t")
            if len(fields) >= 2:
                annotated[fields[0]] = fields[1].strip()
        samples = []
        for member in tree.images_below(posixpath.join(root, "val")):
            wnid = annotated.get(posixpath.basename(member.name), "")
            if wnid not in ids:
                raise UserError(f"{member.name} in {files.shown} has no class in val_annotations.txt; get it again")
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
            raise UserError(f"cannot read {name} in {files.shown} ({error}); get it again") from None


class Folder(Source):
    """Directories of images: PATH/{train,val,test}/CLASS/… or PATH/CLASS/…; class ids follow the sorted names."""

    usage = "folder:PATH"

    def listing(self) -> Listing:
        """List the images; a single top-level directory is entered."""
        files = open_files(self.argument, self.scratch)
        tree = Tree(files)
        root = self._root(tree)
        names = tree.folders(root)
        folders = [split for split in SPLITS if split in names and tree.folders(posixpath.join(root, split))]
        if folders and "train" not in folders:
            raise UserError(f"{files.shown} has {' and '.join(folders)} but no train; add PATH/train/CLASS/IMAGE")
        # A class may be called train as well: its directory then holds images, where a split's holds directories.
        where = {split: posixpath.join(root, split) for split in folders} or {"train": root}
        classes = tuple(tree.folders(where["train"]))
        if not folders and set(classes) <= set(SPLITS):
            classes = ()
        if len(classes) < 2:
            found = f"only the class {classes[0]}" if classes else "no directory of a class"
            raise UserError(f"{files.shown} holds {found}; lay it out as PATH/CLASS/IMAGE or PATH/train/CLASS/IMAGE")
        splits = {split: self._samples(files, tree, folder, classes) for split, folder in where.items()}
        return Listing(base_name(self.argument), classes, splits, files)

    @staticmethod
    def _root(tree: Tree) -> str:
        root = ""
        while True:
            folders = tree.folders(root)
            if len(folders) != 1 or folders[0] in SPLITS or tree.images(root):
                return root
            inner = posixpath.join(root, folders[0])
            if tree.images(inner) or not tree.folders(inner):
                return root
            root = inner

    @staticmethod
    def _samples(files: Files, tree: Tree, folder: str, classes: Sequence[str]) -> list[Sample]:
        unknown = sorted(set(tree.folders(folder)) - set(classes))
        if unknown:
            raise UserError(f"class {unknown[0]} is in {folder} of {files.shown} but not in train; remove or add it")
        samples = []
        for label, name in enumerate(classes):
            images = tree.images_below(posixpath.join(folder, name))
            if not images and name in tree.folders(folder):
                where = posixpath.join(folder, name)
                raise UserError(f"class {name} is empty: {where} in {files.shown} holds no image; fill or remove it")
            samples += [Sample(member, label) for member in images]
        return samples


SOURCES: dict[str, type[Source]] = {
    "digits": Digits,
    "cifar10": Cifar10,
    "cifar100": Cifar100,
    "tiny-imagenet": TinyImageNet,
    "folder": Folder,
    "webdataset": WebDataset,
}


def open_source(text: str, scratch: Path) -> Listing:
    """List what SOURCE, as a user writes it, holds. Raises UserError when it is unknown, missing or malformed."""
    return parse(text)(text.partition(":")[2], scratch).listing()


def parse(text: str) -> type[Source]:
    """Return the class of SOURCE. Raises UserError when there is none, or PATH is left out or does not exist."""
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
    """Return readable, distinct names: the first synonym, with the wnid where two classes share it."""
    short = [words.get(wnid, wnid).split(",")[0].strip() or wnid for wnid in wnids]
    return tuple(
        name if short.count(name) == 1 else f"{name} ({wnid})" for name, wnid in zip(short, wnids, strict=True)
    )
