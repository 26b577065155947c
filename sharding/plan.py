"""The plan of a build: everything it will write, decided before anything is encoded."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from sharding.depth import COLOUR, GREY, Values
from sharding.errors import UserError
from sharding.images import Seen, Target
from sharding.links import Member
from sharding.listing import Listing
from sharding.manifest import SPLITS
from sharding.options import DEFAULT_VAL_FRACTION, Options
from sharding.splits import deal, stratified
from sharding.tars import BLOCK, padded, shown


@dataclass(frozen=True, slots=True)
class Planned:
    """One sample of a shard: `key` is its name in the shard, unique in the data set."""

    key: str
    member: Member
    label: int
    seen: Seen


@dataclass(frozen=True)
class ShardPlan:
    """One shard to write: its split, its file name relative to DATA, and its samples in order.

    `tar`: an existing tar that already holds the samples; the shard is then a link to it, with an index.
    """

    split: str
    file: str
    samples: tuple[Planned, ...]
    tar: Path | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that determines the bytes of a data set, except library versions."""

    name: str
    classes: tuple[str, ...]
    target: Target
    shards: tuple[ShardPlan, ...]

    @property
    def fingerprint(self) -> str:
        """Return 64 hex digits: plans with equal fingerprints, and the same libraries, give the same bytes."""
        digest = hashlib.sha256()
        target: list[object] = [self.target.height, self.target.width, self.target.channels]
        if self.target.values is not None:
            target.append(self.target.values)
        digest.update(json.dumps([self.name, self.classes, target]).encode())
        for shard in self.shards:
            digest.update(f"\n{shard.file}\n".encode())
            digest.update(str(shard.tar or "").encode("utf-8", "surrogateescape"))
            for sample in shard.samples:
                kept = sample.seen.kept_as
                if sample.seen.grey and self.target.channels == 3 and self.target.keeps(sample.seen):
                    kept += " grey"  # a build of an older version, which converted these, must not be continued
                digest.update(f"{sample.key} {sample.label} {kept} ".encode() + sample.seen.sha256)
        return digest.hexdigest()


def make_plan(listing: Listing, seen: list[Seen | None], options: Options) -> Plan:
    """Make the splits, choose size and channels, and distribute the samples over shards.

    `seen` holds, in the order of the listing, what inspecting each image found; None for an image that is left out.
    Raises UserError when sizes differ and no size is requested, or a class is too small to be split.
    """
    splits: dict[str, list[Planned]] = {}
    torn, number = {tar for tar, _ in listing.faults}, 0
    for split, samples in listing.splits.items():
        splits[split] = []
        for sample in samples:
            if (look := seen[number]) is not None:
                splits[split].append(Planned(f"{number:08d}", sample.member, sample.label, look))
            else:
                torn.add(sample.member.tar)
            number += 1
    _check_classes(splits, listing.classes)
    looks = [sample.seen for samples in splits.values() for sample in samples]
    _check_depth(looks)
    target = replace(choose_target(looks, options.image_size), values=options.value_range)
    _cut_splits(splits, listing, options)
    in_place = bool(listing.in_place) and all(map(target.keeps, looks))
    shards: list[ShardPlan] = []
    for split in SPLITS:
        if in_place:
            shards += _as_they_lie(split, splits[split], listing.in_place, torn)
        else:
            shards += _deal_split(split, splits[split], options)
    return Plan(listing.name, listing.classes, target, tuple(shards))


def check_splits(listing: Listing, options: Options) -> None:
    """Raise UserError if there are fewer than two classes, or the fractions do not fit the splits of the source."""
    if len(listing.classes) < 2:
        raise UserError(f"{listing.name} holds only the class {shown(*listing.classes)}; give one of two or more")
    if "test" not in listing.splits and options.test_fraction is None:
        raise UserError(f"{listing.name} has no test set; give --test-fraction, such as 0.1, to split one off train")
    for split, fraction in (("test", options.test_fraction), ("val", options.val_fraction)):
        if split in listing.splits and fraction is not None:
            raise UserError(f"{listing.name} already has a {split} set; leave --{split}-fraction out")


def choose_target(seen: list[Seen], image_size: int | None) -> Target:
    """Return size and channels of the data set. Raises UserError when sizes differ and `image_size` is None."""
    channels = 1 if all(look.grey for look in seen) else 3
    if image_size is not None:
        return Target(image_size, image_size, channels)
    sizes = Counter((look.width, look.height) for look in seen)
    if len(sizes) > 1:
        common = ", ".join(f"{count} of {width}x{height}" for (width, height), count in sizes.most_common(3))
        raise UserError(f"images differ in size ({len(sizes)} sizes: {common}, …); give --image-size")
    width, height = next(iter(sizes))
    return Target(height, width, channels)


def _check_classes(splits: dict[str, list[Planned]], classes: tuple[str, ...]) -> None:
    for split, samples in splits.items():
        if not samples:
            raise UserError(f"{split} holds no image that can be read; check the source")
    missing = set(range(len(classes))) - {sample.label for sample in splits["train"]}
    if missing:
        raise UserError(f"class {shown(classes[min(missing)])} has no image in train; add images or remove the class")


def _check_depth(seen: list[Seen]) -> None:
    """Raise UserError if 16-bit images use only values so small that 8 bits keep nothing of them."""
    for depth, images, least in ((GREY, "16-bit images", 256), (COLOUR, "images of 16-bit colours", 512)):
        tops = [look.highest for look in seen if look.depth == depth]
        if 0 < (highest := max(tops, default=-1)) < least:
            cure = f"give --value-range 0 {highest}, or other values that become black and white"
            if depth == COLOUR:
                cure = "convert them to 8 bits first, because --value-range does not apply to colours"
            raise UserError(
                f"no pixel of {len(tops):,} {images} is above {highest}, so that they would be of one shade; {cure}"
            )


def about(plan: Plan) -> list[str]:
    """Return what the user should know about a plan: images found in two classes or splits, and unused pixel values."""
    first, twice = dict[bytes, tuple[str, Planned]](), dict[str, list[str]]()
    for shard in plan.shards:
        for sample in shard.samples:
            split, other = first.setdefault(sample.seen.sha256, (shard.split, sample))
            if other.label != sample.label or split != shard.split:
                kind = "classes" if other.label != sample.label else "splits"
                twice.setdefault(kind, []).append(f"{shown(other.member.name)} and {shown(sample.member.name)}")
    notes = [f"images found in two {kind}: {len(pairs):,} ({pairs[0]})" for kind, pairs in twice.items()]
    return notes + _about_depth([s.seen for shard in plan.shards for s in shard.samples], plan.target.values)


def _about_depth(seen: list[Seen], values: Values | None) -> list[str]:
    """Return notes about 16-bit images that use a small part of their range, and about a range that does not apply to images."""
    notes, tops = [], {depth: [s.highest for s in seen if s.depth == depth] for depth in (GREY, COLOUR)}
    if 0 <= (highest := max(tops[GREY], default=-1)) < 2**15:
        spread = f"--value-range 0 {highest} spreads them over all shades"
        notes.append(f"16-bit images are read as 0 … 65535, but their largest value is {highest}: {spread}")
    if 0 <= (highest := max(tops[COLOUR], default=-1)) < 2**15:
        convert = "convert them to 8 bits to spread them over all shades"
        notes.append(f"16-bit colours are read as 0 … 65535, but no value is above {highest}: {convert}")
    if values is not None and tops[COLOUR]:
        notes.append(f"--value-range has no effect on {len(tops[COLOUR]):,} images of 16-bit colours")
    elif values is not None and not tops[GREY]:
        notes.append("--value-range has no effect, because no image has more than 8 bits")
    return notes


def _cut_splits(splits: dict[str, list[Planned]], listing: Listing, options: Options) -> None:
    """Cut test, then val, from train if the source does not have them."""
    for split, fraction in (("test", options.test_fraction), ("val", options.val_fraction)):
        if split in splits:
            continue
        train = splits["train"]
        total = round((fraction or DEFAULT_VAL_FRACTION) * len(train))
        if split == "val" and fraction is None and listing.val_samples is not None:
            total = listing.val_samples
        labels = [sample.label for sample in train]
        mask = stratified(labels, total, seed=options.seed, purpose=split, classes=listing.classes).tolist()
        splits[split] = [sample for sample, chosen in zip(train, mask, strict=True) if chosen]
        splits["train"] = [sample for sample, chosen in zip(train, mask, strict=True) if not chosen]


def _deal_split(split: str, samples: list[Planned], options: Options) -> list[ShardPlan]:
    # A sample takes two header blocks, one block for its label and the padded image.
    total = sum(3 * BLOCK + padded(sample.member.size) for sample in samples)
    shards = min(len(samples), -(-total // options.shard_size))
    dealt = deal([sample.label for sample in samples], shards, seed=options.seed, split=split)
    return [
        ShardPlan(split, f"{split}/{number:06d}.tar", tuple(samples[i] for i in rows.tolist()))
        for number, rows in enumerate(dealt)
    ]


def _as_they_lie(split: str, samples: list[Planned], paths: tuple[Path, ...], torn: set[int]) -> list[ShardPlan]:
    """Return a shard for each tar that holds samples of the split; a split cut from train uses rows of train's tars.

    Tars with skipped samples (`torn`) are written again without those, because other programs read whole tars.
    """
    by_tar: dict[int, list[Planned]] = {}
    for sample in samples:
        by_tar.setdefault(sample.member.tar, []).append(sample)
    return [
        ShardPlan(split, f"{split}/{tar:06d}.tar", tuple(rows), None if tar in torn else paths[tar])
        for tar, rows in sorted(by_tar.items())
    ]
