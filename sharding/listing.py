"""What every source provides: its samples, and a reader of their bytes."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from sharding.errors import UserError
from sharding.images import Item
from sharding.links import Member
from sharding.tars import writable

UNPACKED, PIXELS = SCRATCH = ("source.tar", "pixels")
"""Names of the temporary files a source may make: a decompressed archive, an array of pixels."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image: where its bytes are, and its class."""

    member: Member
    label: int


class Reader(Protocol):
    """Yields a sample's encoded bytes or its pixels. It can be sent to another process."""

    def read(self, member: Member) -> Item:
        """Return the sample. Raises OSError or ValueError with the reason when it cannot be read."""


@dataclass(frozen=True)
class Listing:
    """What a source holds. `splits` has train and, where the source brings them, val and test, in a fixed order.

    `in_place`: the tars that hold the samples, if the data set may be just an index of them; empty: tars are written.
    `val_samples`: how many samples val gets when the user asks for no fraction (None: the builder's own fraction).
    `left_out`: how many files of each kind are not used; `notes`: what the user should know about how the source was read;
    `faults`: samples that are skipped because they have no image or no label, as (number of the tar, reason).
    """

    name: str
    classes: tuple[str, ...]
    splits: dict[str, list[Sample]]
    reader: Reader
    val_samples: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    in_place: tuple[Path, ...] = ()
    left_out: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    faults: tuple[tuple[int, str], ...] = ()


def composed(name: str) -> str:
    """Return a class name in the one Unicode form, and with the escapes, in which names are compared."""
    return unicodedata.normalize("NFC", writable(name))


def chosen(listing: Listing, wanted: Sequence[str]) -> Listing:
    """Return the listing restricted to some classes: those named in any Unicode form, in that order, or the first N.

    Raises UserError for a class that is not there, or is named twice.
    """
    same = {composed(name): name for name in listing.classes}
    names = tuple(name if name in listing.classes else same.get(composed(name), name) for name in map(writable, wanted))
    if len(names) == 1 and names[0] not in listing.classes and names[0].isdecimal():
        if not 0 < int(names[0]) <= len(listing.classes):
            raise UserError(f"--classes is {names[0]}; {listing.name} has {len(listing.classes)} classes")
        names = listing.classes[: int(names[0])]
    for name in names:
        if name not in listing.classes or names.count(name) > 1:
            what = "is named twice" if name in listing.classes else f"is not a class of {listing.name}"
            raise UserError(f"--classes: {name} {what}; give a number, or names of classes, each once")
    labels = {listing.classes.index(name): label for label, name in enumerate(names)}
    splits = {
        split: [Sample(sample.member, labels[sample.label]) for sample in samples if sample.label in labels]
        for split, samples in listing.splits.items()
    }
    others = sum(map(len, listing.splits.values())) - sum(map(len, splits.values()))
    left_out = listing.left_out | ({"images of other classes": others} if others else {})
    return replace(listing, classes=names, splits=splits, in_place=(), left_out=left_out, val_samples=None)
