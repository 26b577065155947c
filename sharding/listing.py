"""What every source answers: its samples, and a reader of their bytes."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

from sharding.archives import Member
from sharding.images import Item

ARCHIVE, PIXELS = SCRATCH = ("source.tar", "pixels")
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

    `in_place`: the tars that hold the samples, where the data set may be an index of them; empty: it is written anew.
    `val_samples`: how many samples val gets when the user asks for no fraction (None: the builder's own fraction).
    """

    name: str
    classes: tuple[str, ...]
    splits: dict[str, list[Sample]]
    reader: Reader
    val_samples: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    in_place: tuple[Path, ...] = ()


class Source(ABC):
    """One kind of SOURCE. `usage` is how a user writes it."""

    usage: ClassVar[str]

    def __init__(self, argument: str, scratch: Path) -> None:
        """`argument` is what follows the colon; `scratch` is a directory for temporary files."""
        self.argument, self.scratch = argument, scratch

    @abstractmethod
    def listing(self) -> Listing:
        """List the samples. Raises UserError when the source is missing or malformed."""
