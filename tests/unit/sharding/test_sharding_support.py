"""Small inputs for the tests of sharding; holds no test itself."""

import io
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[3]


def pixels(seed: int, height: int = 8, width: int = 8, channels: int = 3) -> np.ndarray:
    """Random uint8 [H, W, C], or [H, W] for one channel."""
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(array: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind, **options)
    return stream.getvalue()


def write_folder(root: Path, counts: dict[str, int], *, size: int = 8, channels: int = 3, seed: int = 0) -> Path:
    """Write `counts[folder]` PNG images to each folder below root."""
    for number, (folder, count) in enumerate(counts.items()):
        directory = root / folder
        directory.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image = pixels(seed * 10**6 + number * 10**4 + i, size, size, channels)
            (directory / f"{i:04d}.png").write_bytes(encoded(image))
    return root


def to_tar(folder: Path, path: Path, top: str = "top", mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        archive.add(folder, top)
    return path


def to_zip(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


def contents(dest: Path, *, without: tuple[str, ...] = ("build.json",)) -> dict[str, bytes]:
    """All files below dest, by name."""
    files = {str(path.relative_to(dest)): path.read_bytes() for path in sorted(dest.rglob("*")) if path.is_file()}
    return {name: data for name, data in files.items() if name not in without}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "sharding", *map(str, arguments)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, env=environment(), timeout=240, check=False, **options
    )


def flip(path: Path, position: int, mask: int = 1) -> None:
    """Flip bits of one byte of a file, read-only or not."""
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= mask
    path.write_bytes(data)
