"""The options of a build."""

import math
from dataclasses import dataclass

from sharding.errors import UserError

DEFAULT_VAL_FRACTION = 0.05
LARGEST_SIDE = 4096


@dataclass(frozen=True)
class Options:
    """The options of a build. Raises UserError for values that make no sense.

    `shard_size` is in bytes, of the source's images; fractions lie between 0 and 1; `workers` None means all cores;
    `layout` splits or classes says how folders named train or test are read (None: decided by their content);
    `first_label` is the smallest label in webdataset tars; `value_range`: the values that become 0 and 255 in images of
    more than 8 bits; `classes`: the names of the classes to use, or the number of first ones (empty: all).
    """

    shard_size: int = 64_000_000
    workers: int | None = None
    val_fraction: float | None = None
    test_fraction: float | None = None
    image_size: int | None = None
    seed: int = 0
    on_error: str = "stop"
    layout: str | None = None
    first_label: int = 0
    value_range: tuple[float, float] | None = None
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, fraction in (("val-fraction", self.val_fraction), ("test-fraction", self.test_fraction)):
            if fraction is not None and not 0 < fraction < 1:
                raise UserError(f"--{name} is {fraction}; give a number between 0 and 1, both excluded")
        for name, least in (("shard_size", 1), ("workers", 1), ("image_size", 1), ("seed", 0), ("first_label", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} is {value}; give {least} or more")
        if self.image_size is not None and self.image_size > LARGEST_SIDE:
            raise UserError(f"--image-size is {self.image_size}; give {LARGEST_SIDE} or less")
        if self.on_error not in ("stop", "skip"):
            raise UserError(f"--on-error is {self.on_error}; give stop or skip")
        if self.layout not in (None, "splits", "classes"):
            raise UserError(f"--layout is {self.layout}; give splits or classes")
        if self.value_range is not None and not -math.inf < self.value_range[0] < self.value_range[1] < math.inf:
            low, high = self.value_range
            raise UserError(f"--value-range is {low:g} {high:g}; give two numbers, the smaller first")
