"""What a dataset directory holds: DATA/manifest.json, its checks and its fingerprint."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from sharding.errors import UserError
from sharding.files import write_atomic

FORMAT = "gdd-shards/1"
FILE, BUILD_FILE = "manifest.json", "build.json"
SPLITS = ("train", "val", "test")
_SHARD_FILE = re.compile(r"(train|val|test)/\d{6,}\.tar")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ShardInfo:
    """One shard: `file` is relative to DATA (``train/000000.tar``), its index is the same name with ``.npy``."""

    file: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str

    @property
    def index_file(self) -> str:
        """The index's name, relative to DATA."""
        return self.file.removesuffix(".tar") + ".npy"


@dataclass(frozen=True)
class SplitInfo:
    """One split: number of samples, samples per class in class order, and its shards."""

    samples: int
    class_counts: tuple[int, ...]
    shards: tuple[ShardInfo, ...]


@dataclass(frozen=True)
class Manifest:
    """What DATA holds. `mean` and `std` are per channel of the train split, of pixels in [0, 1]; size in pixels.

    `std` of a channel that is constant is 1. `left_out`: how many files of each kind the build did not use.
    """

    name: str
    classes: tuple[str, ...]
    height: int
    width: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    versions: dict[str, str]
    splits: dict[str, SplitInfo]
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that name this data: sha256 of the canonical JSON of all but `versions` and `left_out`."""
        document = {key: value for key, value in self.to_json().items() if key not in ("versions", "left_out")}
        canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Return the content of manifest.json as a document."""
        document = {
            "format": FORMAT,
            "name": self.name,
            "classes": [{"id": i, "name": name} for i, name in enumerate(self.classes)],
            "image": {"height": self.height, "width": self.width, "channels": self.channels},
            "mean": list(self.mean),
            "std": list(self.std),
            "versions": dict(sorted(self.versions.items())),
            "splits": {name: asdict(self.splits[name]) for name in SPLITS if name in self.splits},
        }
        return document | ({"left_out": self.left_out} if self.left_out else {})

    @staticmethod
    def from_json(document: Any) -> "Manifest":
        """Read the document of `to_json`. Raises ValueError, KeyError or TypeError when it is malformed or inconsistent."""
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        if [entry["id"] for entry in document["classes"]] != list(range(len(document["classes"]))):
            raise ValueError("class ids are not 0, 1, 2, …")
        manifest = Manifest(
            document["name"],
            tuple(entry["name"] for entry in document["classes"]),
            **{name: document["image"][name] for name in ("height", "width", "channels")},
            mean=tuple(float(value) for value in document["mean"]),
            std=tuple(float(value) for value in document["std"]),
            versions=dict(document["versions"]),
            splits={name: _split_from_json(split) for name, split in document["splits"].items()},
            left_out={str(what): int(count) for what, count in document.get("left_out", {}).items()},
        )
        _check(manifest)
        return manifest

    @staticmethod
    def load(directory: Path | str) -> "Manifest":
        """Read DATA/manifest.json. Raises UserError when it is missing, not ours, unparsable or contradicts itself."""
        path = Path(directory) / FILE
        try:
            return parse_manifest(path.read_bytes(), str(path))
        except (FileNotFoundError, NotADirectoryError):
            cure = "build one with python -m sharding build"
            if (Path(directory) / BUILD_FILE).exists():
                cure = "its build was not finished; run the same build command again"
            raise UserError(f"no dataset in {directory} ({FILE} is missing); {cure}") from None
        except OSError as error:
            raise UserError(f"cannot read {path} ({error.strerror}); check its permissions") from None

    def save(self, directory: Path | str) -> None:
        """Write DATA/manifest.json atomically."""
        write_atomic(Path(directory) / FILE, self.to_bytes())

    def to_bytes(self) -> bytes:
        """Return the content of manifest.json."""
        return json.dumps(self.to_json(), indent=1).encode() + b"\n"


def parse_manifest(content: bytes, path: str) -> Manifest:
    """Read the content of a manifest.json. Raises UserError naming `path` when it is not ours or contradicts itself."""
    try:
        return Manifest.from_json(json.loads(content))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path} is not a dataset manifest ({reason}); build the dataset again") from None


def _split_from_json(split: dict[str, Any]) -> SplitInfo:
    shards = tuple(ShardInfo(*(shard[field.name] for field in fields(ShardInfo))) for shard in split["shards"])
    return SplitInfo(split["samples"], tuple(split["class_counts"]), shards)


def _check(manifest: Manifest) -> None:
    """Raise ValueError where the manifest contradicts itself."""
    if not manifest.name or not isinstance(manifest.name, str):
        raise ValueError("its name is empty")
    if not manifest.classes or not all(isinstance(name, str) for name in manifest.classes):
        raise ValueError("its classes are not named")
    if not (_positive(manifest.height) and _positive(manifest.width) and manifest.channels in (1, 3)):
        raise ValueError("its image size is not height × width × 1 or 3 channels")
    if not len(manifest.mean) == len(manifest.std) == manifest.channels:
        raise ValueError("mean and std do not fit the number of channels")
    if "train" not in manifest.splits:
        raise ValueError("it has no train split")
    for name, split in manifest.splits.items():
        _check_split(name, split, len(manifest.classes))


def _check_split(name: str, split: SplitInfo, classes: int) -> None:
    if name not in SPLITS:
        raise ValueError(f"{name} is not one of the splits {', '.join(SPLITS)}")
    if len(split.class_counts) != classes or sum(split.class_counts) != split.samples:
        raise ValueError(f"the class counts of {name} do not add up to its samples")
    if not split.shards or sum(shard.samples for shard in split.shards) != split.samples:
        raise ValueError(f"the shards of {name} do not add up to its samples")
    for shard in split.shards:
        # Names are joined to a directory, so they must not point outside it.
        if not _SHARD_FILE.fullmatch(shard.file) or not shard.file.startswith(name + "/"):
            raise ValueError(f"{shard.file!r} is not the name of a shard of {name}")
        if not (_positive(shard.samples) and _positive(shard.bytes)):
            raise ValueError(f"{shard.file} has no samples or no bytes")
        if not (_SHA256.fullmatch(shard.sha256) and _SHA256.fullmatch(shard.index_sha256)):
            raise ValueError(f"{shard.file} has no sha256")


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
