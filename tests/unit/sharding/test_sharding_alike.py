"""What a directory gives, its tar and its zip give: the same manifest, over generated trees."""

import os
import re
import shutil
import stat
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_sharding_support import contents, encoded, pixels

from sharding.errors import UserError
from sharding.options import Options
from sharding.writer import build

EXAMPLES, MORE = 60, 2000
IMAGES = [encoded(pixels(seed, 4, 4), "PNG" if seed % 2 else "JPEG") for seed in range(12)]
OTHERS = [b"", b"some text", b"PK\x03\x04", b"\xff\xfe\x00"]
CAFE = "café"
CLASSES = [
    "cat",
    "Cat",
    "CAT",
    CAFE,
    unicodedata.normalize("NFD", CAFE),
    "caf\udce9",
    "猫",
    "a b",
    "c\\d",
    "train",
    "Test",
    "x.y",
    "-",
]
FILES = [
    "0.png",
    "1.PNG",
    "2.Jpeg",
    "3",
    "4.jpg?w=200",
    "5.avif",
    "a\\b.png",
    "\udcff.png",
    "é.png",
    "6.png ",
    "deep/7.png",
    "deep/er/8.jpg",
]
CLUTTER = ["note.txt", "9.HEIC", ".hidden.png", "@eaDir/0.png/thumb.jpg", "__MACOSX/._0.png", "Thumbs.db", "README"]
SPLITS = [
    {"train": "train"},
    {"train": "Training", "test": "Testing"},
    {"train": "TRAIN", "val": "valid", "test": "test"},
]
SEEN: list[str] = []


class Raw(zipfile.ZipInfo):
    """A member whose name is bytes, as other programs than Python write it; with or without the mark of UTF-8."""

    marked = False

    def _encodeFilenameFlags(self):
        return os.fsencode(self.filename), self.flag_bits | (0x800 if self.marked else 0)


@st.composite
def trees(draw) -> dict[str, bytes | str | None]:
    """Path → what is there: content of a file, ``target`` of a link, None for a pipe."""
    tree: dict[str, bytes | str | None] = {}
    classes = draw(st.lists(st.sampled_from(CLASSES), min_size=1, max_size=4, unique=True))
    splits = draw(st.sampled_from([{"train": ""}, *SPLITS]))
    number = 0
    for split, folder in splits.items():
        for name in classes if split == "train" else draw(st.permutations(classes)):
            for file in draw(st.lists(st.sampled_from(FILES), min_size=1, max_size=4, unique=True)):
                tree[os.path.join(folder, name, file)] = IMAGES[number % len(IMAGES)]
                number += 1
    folders = sorted({os.path.dirname(path) for path in tree})
    for clutter in draw(st.lists(st.sampled_from(CLUTTER), max_size=3, unique=True)):
        tree[os.path.join(draw(st.sampled_from(["", *folders])), clutter)] = draw(st.sampled_from(OTHERS))
    for number in range(draw(st.integers(0, 3))):
        link = os.path.join(
            draw(st.sampled_from(["", *folders])),
            draw(st.sampled_from(["link", "link.png"])) + str(number) * (number > 1),
        )
        target = draw(st.sampled_from(["gone", "..", ".", "../..", *folders, *tree]))
        tree.setdefault(
            link, os.path.relpath(target, os.path.dirname(link) or ".") if target in (*folders, *tree) else target
        )
    if draw(st.booleans()):
        tree[os.path.join(draw(st.sampled_from(folders)), "pipe.png")] = None
    return tree


def write(root: Path, tree: dict[str, bytes | str | None]) -> Path:
    for name, content in tree.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            os.mkfifo(path)
        elif isinstance(content, str):
            path.symlink_to(content)
        else:
            path.write_bytes(content)
    return root


def to_tar(root: Path, path: Path, top: str, form: int) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        archive.add(root, top)
    return path


def to_zip(root: Path, path: Path, top: str, marked: bool, folders: bool) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*")):
            mode = file.lstat().st_mode
            if stat.S_ISDIR(mode) and not folders:
                continue
            info = Raw(os.path.join(top, file.relative_to(root)) + "/" * stat.S_ISDIR(mode))
            info.marked, info.external_attr = marked and max(info.filename) < "\udc80", mode << 16
            data = (
                os.fsencode(os.readlink(file))
                if file.is_symlink()
                else file.read_bytes()
                if stat.S_ISREG(mode)
                else b""
            )
            archive.writestr(info, data)
    return path


def outcome(path: Path, dest: Path, top: str = ".") -> object:
    """The manifest and all bytes of a build; where it is refused, what is said of it."""
    lines: list[str] = []
    try:
        manifest = build(
            f"folder:{path}", dest, Options(workers=1, on_error="skip", image_size=4), log=lines.append
        ).manifest
    except UserError:
        try:
            options = Options(workers=1, test_fraction=0.3, on_error="skip", image_size=4)
            manifest = build(f"folder:{path}", dest, options, log=lines.append).manifest
        except UserError as error:
            return inside(top, str(error).replace(str(path), "PATH"))
    said = [inside(top, line) for line in lines if "images/s" not in line]
    return manifest.to_json(), contents(dest), said


def inside(top: str, line: str) -> str:
    """Paths in a line as they are below ``top``, under which an archive holds the whole tree."""
    return re.sub(rf"(^|[ (]){re.escape(top)}/", r"\1", line)


def alike(scratch: Path, tree: dict[str, bytes | str | None], top: str, form: int, marked: bool, folders: bool) -> None:
    shutil.rmtree(scratch, ignore_errors=True)
    root = write(scratch / "s", tree)
    first = outcome(root, scratch / "d0")
    SEEN.append("refused" if isinstance(first, str) else "built")
    for number, path in enumerate(
        [to_tar(root, scratch / "s.tar", top, form), to_zip(root, scratch / "s.zip", top, marked, folders)]
    ):
        assert outcome(path, scratch / f"d{number + 1}", top) == first


CASES = {
    "tree": trees(),
    "top": st.sampled_from([".", "s", "x/y"]),
    "form": st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    "marked": st.booleans(),
    "folders": st.booleans(),
}


QUIET = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck), "phases": [Phase.generate]}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("alike") / "scratch"


@settings(max_examples=EXAMPLES, derandomize=True, **QUIET)
@given(**CASES)
def test_a_directory_its_tar_and_its_zip_give_one_manifest(scratch, tree, top, form, marked, folders):
    alike(scratch, tree, top, form, marked, folders)


def test_the_trees_reach_both_ends():
    assert len(SEEN) >= EXAMPLES
    assert SEEN.count("built") > EXAMPLES // 4
    assert "refused" in SEEN


@pytest.mark.slow
@settings(max_examples=MORE, **QUIET)
@given(**CASES)
def test_a_directory_its_tar_and_its_zip_give_one_manifest_longer(scratch, tree, top, form, marked, folders):
    alike(scratch, tree, top, form, marked, folders)
