"""Nothing is left out without a word: what a build does not use is counted by kind, said, and recorded."""

import dataclasses
import errno
import io
import json
import os
import socket
from functools import partial

import numpy as np
import pytest
import webdataset
from PIL import Image, features
from test_sharding_support import encoded, pixels, run, to_tar, to_zip, write_folder

from sharding.errors import UserError
from sharding.layout import summary
from sharding.links import check_walk
from sharding.manifest import Manifest
from sharding.options import Options
from sharding.writer import build

ONE = Options(workers=1, test_fraction=0.2)


def put(path, content: bytes = b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def stored(dest) -> list[tuple[bytes, int]]:
    """The pixels and the label of every sample, as stock webdataset and Pillow read them."""
    manifest, found = Manifest.load(dest), []
    for split in manifest.splits.values():
        urls = [str(dest / shard.file) for shard in split.shards]
        for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False):
            (payload,) = [sample[kind] for kind in ("jpg", "png", "webp") if kind in sample]
            image = Image.open(io.BytesIO(payload)).convert("L" if manifest.channels == 1 else "RGB")
            assert image.size == (manifest.width, manifest.height)
            found.append((image.tobytes(), int(sample["cls"])))
    assert np.bincount([label for _, label in found]).tolist() == [
        sum(counts) for counts in zip(*(split.class_counts for split in manifest.splits.values()), strict=True)
    ]
    return sorted(found)


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "s", {"cat": 10, "dog": 10})


def test_what_is_not_used_is_counted_recorded_and_not_part_of_the_fingerprint(folder, tmp_path):
    plain = build(f"folder:{folder}", tmp_path / "plain", ONE).manifest
    assert plain.left_out == {}
    assert "left_out" not in json.loads((tmp_path / "plain/manifest.json").read_text())
    image = encoded(pixels(1))
    for name in ("cat/@eaDir/0.png/THUMB.jpg", "@eaDir/1.png", "#recycle/cat/2.png", "__MACOSX/cat/._0.png"):
        put(folder / name, image)
    for name in ("cat/.DS_Store", ".thumbs/x.png", "cat/1.HEIC", "dog/2.heic", "cat/3.jxl", "LICENSE", "dog/list.txt"):
        put(folder / name)
    put(folder / "stray.png", image)
    manifest = build(f"folder:{folder}", tmp_path / "d", ONE).manifest
    assert manifest.left_out == {
        ".heic files": 2,
        ".jxl files": 1,
        ".txt files": 1,
        "files in #recycle": 1,
        "files in @eaDir": 2,
        "files without a suffix": 1,
        "hidden files": 2,
        "files in __MACOSX": 1,
        "images outside all directories": 1,
    }
    assert manifest.fingerprint == plain.fingerprint
    assert Manifest.load(tmp_path / "d") == manifest
    assert dataclasses.replace(manifest, left_out={}) == plain
    assert stored(tmp_path / "d") == stored(tmp_path / "plain")


def test_the_last_lines_and_info_tell_classes_with_counts_and_what_is_left_out(folder, tmp_path):
    put(folder / "cat/1.heic")
    done = run("build", f"folder:{folder}", tmp_path / "d", "--test-fraction", "0.2")
    assert done.stdout.splitlines()[1:] == ["2 classes: cat 10, dog 10", "left out: .heic files 1"]
    told = run("info", tmp_path / "d").stdout.splitlines()
    assert "left out: .heic files 1" in told
    assert [line.split() for line in told[-2:]] == [["0", "7", "1", "2", "cat"], ["1", "7", "1", "2", "dog"]]


@pytest.mark.parametrize(
    ("kind", "suffix"), [("TIFF", "tif"), ("GIF", "gif"), ("MPO", "jpg"), ("PNG", "png"), ("WEBP", "webp")]
)
def test_pages_and_frames_behind_the_first_are_counted(folder, tmp_path, kind, suffix):
    pages = [Image.fromarray(np.full((8, 8, 3), shade, np.uint8)) for shade in (0, 100, 255)]
    stream = io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {}
    pages[0].save(stream, kind, save_all=True, append_images=pages[1:], **options)
    put(folder / f"cat/pages.{suffix}", stream.getvalue())
    assert build(f"folder:{folder}", tmp_path / "d", ONE).manifest.left_out == {"further pages or frames": 2}
    assert (bytes(8 * 8 * 3), 0) in stored(tmp_path / "d")


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_pages_of_sixteen_bits_are_counted_too(tmp_path, compression):
    folder = write_folder(tmp_path / "s", {"cat": 10, "dog": 10}, channels=1)
    pages = [Image.fromarray(np.full((8, 8), shade * 257, np.uint16)) for shade in (200, 100)]
    stream = io.BytesIO()
    pages[0].save(stream, "TIFF", save_all=True, append_images=pages[1:], compression=compression)
    put(folder / "cat/pages.tif", stream.getvalue())
    assert build(f"folder:{folder}", tmp_path / "d", ONE).manifest.left_out == {"further pages or frames": 1}
    assert (bytes([200]) * 64, 0) in stored(tmp_path / "d")
    # An offset to a next page that leads nowhere is damage behind the pixels.
    stream = io.BytesIO()
    pages[0].save(stream, "TIFF")
    lost = stream.getvalue()
    start = int.from_bytes(lost[4:8], "little")
    end = start + 2 + 12 * int.from_bytes(lost[start : start + 2], "little")
    put(folder / "cat/pages.tif", lost[:end] + b"\xff\xff\xff\x7f" + lost[end + 4 :])
    assert build(f"folder:{folder}", tmp_path / "e", ONE).manifest.left_out == {"further pages or frames": 1}
    assert (bytes([200]) * 64, 0) in stored(tmp_path / "e")


def test_many_kinds_are_summed_up():
    assert summary({f"k{i}": 30 - i for i in range(15)}).endswith("k11 19, 3 more kinds 51")


def test_images_are_told_by_their_first_bytes_where_the_name_says_nothing(folder, tmp_path):
    expected = [(pixels(90 + i).tobytes(), 0) for i in range(3)]
    for i, name in enumerate(("30", "31.jpg?w=200", "32.png_large")):
        put(folder / "cat" / name, encoded(pixels(90 + i)))
    put(folder / "cat/33", b"no image")
    put(folder / "cat/34.2024-01-01", b"no image")
    lines: list[str] = []
    manifest = build(f"folder:{folder}", tmp_path / "d", ONE, log=lines.append).manifest
    assert [x for x in stored(tmp_path / "d") if x in expected] == sorted(expected)
    assert manifest.left_out == {"files without a suffix": 1, "files with a suffix of their own": 1}
    # The ? is cut off first.
    assert any("by their first bytes, because their names have no image suffix: 2" in line for line in lines)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow does not read AVIF")
def test_avif_is_read(tmp_path):
    folder = write_folder(tmp_path / "s", {"cat": 6, "dog": 6})
    Image.fromarray(np.full((8, 8, 3), 77, np.uint8)).save(folder / "cat/9.avif", quality=100)
    build(f"folder:{folder}", tmp_path / "d", ONE)
    (found,) = [x for x, label in stored(tmp_path / "d") if label == 0 and max(x) - min(x) < 8]
    assert abs(np.frombuffer(found, np.uint8).astype(int) - 77).max() < 4


def test_pipes_sockets_and_lost_links_are_counted_and_never_opened(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder / "cat")
    os.mkfifo("pipe.png")
    os.mkfifo("no suffix")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket.jpg")
        os.symlink("nowhere", "lost")
        os.symlink("..", "up")
        for number, path in enumerate([folder, to_tar(folder, tmp_path / "s.tar")]):
            left_out = build(f"folder:{path}", tmp_path / str(number), ONE).manifest.left_out
            # tar leaves sockets out itself
            assert left_out == {"pipes, sockets and devices": 3 - number, "links that lead nowhere or back": 2}
    assert stored(tmp_path / "0") == stored(tmp_path / "1")


def test_directories_that_cannot_be_read_stop_nothing_if_they_are_left_out_anyway(folder, tmp_path, monkeypatch):
    closed = ("lost+found", ".Trash-1000", "System Volume Information", "cat/@eaDir")
    for name in (*closed, "dog/inner"):
        (folder / name).mkdir()
    look = os.scandir

    def scan(path, *, also=()):
        if not isinstance(path, int) and os.path.relpath(path, folder) in (*closed, *also):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
        return look(path)

    monkeypatch.setattr(os, "scandir", scan)
    expected = {
        "files in lost+found": 1,
        "hidden files": 1,
        "files in System Volume Information": 1,
        "files in @eaDir": 1,
    }
    assert build(f"folder:{folder}", tmp_path / "d", ONE).manifest.left_out == expected
    for other in ("dog/inner", "."):
        monkeypatch.setattr(os, "scandir", partial(scan, also=(other,)))
        with pytest.raises(UserError, match=r"cannot read .*/s.* \(Permission denied\); check its permissions"):
            build(f"folder:{folder}", tmp_path / "e", ONE)


def test_a_lost_link_that_is_called_like_an_image_is_an_unreadable_image(folder, tmp_path):
    (folder / "cat/gone.png").symlink_to("/nowhere.png")
    for path in (folder, to_tar(folder, tmp_path / "s.tar")):
        with pytest.raises(
            UserError, match=r"cannot read .*cat/gone.png \(one of the links that lead nowhere or back\)"
        ):
            build(f"folder:{path}", tmp_path / "d", ONE)


def test_a_pipe_as_source_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    os.mkfifo(pipe := tmp_path / "in/x.tar")
    for source in (f"folder:{pipe}", f"webdataset:{pipe}", f"webdataset:{tmp_path / 'in'}"):
        with pytest.raises(UserError, match=r"x\.tar is a (pipe|directory, a pipe)"):
            build(source, tmp_path / "d", ONE)


def test_links_to_each_other_end(tmp_path):
    folder = write_folder(tmp_path / "s", {str(i): 1 for i in range(9)})
    for i in range(9):
        for j in range(9):
            if i != j:
                (folder / str(i) / f"to{j}").symlink_to(f"../{j}")
    for path in (
        folder,
        to_tar(folder, tmp_path / "s.tar"),
    ):
        with pytest.raises(UserError, match="links reach the same 1[01] directories by"):
            build(f"folder:{path}", tmp_path / "d", ONE)
    check_walk(1100, 10)


def test_a_class_that_is_a_link_is_one_in_a_directory_a_tar_and_a_zip(folder, tmp_path):
    (folder / "tiger").symlink_to("cat")
    expected = sorted([*(x for x in _pixels(folder, "cat", 0)), *_pixels(folder, "dog", 1), *_pixels(folder, "cat", 2)])
    zipped = tmp_path / "s.zip"
    _zip_with_links(folder, zipped)
    for number, path in enumerate([folder, to_tar(folder, tmp_path / "s.tar"), zipped]):
        lines: list[str] = []
        assert build(f"folder:{path}", tmp_path / str(number), ONE, log=lines.append).manifest.classes == (
            "cat",
            "dog",
            "tiger",
        )
        assert stored(tmp_path / str(number)) == expected
        assert any("images found in two classes: 10" in line for line in lines)


def _pixels(folder, name, label):
    return [(np.asarray(Image.open(path)).tobytes(), label) for path in sorted((folder / name).iterdir())]


def _zip_with_links(folder, path):
    import stat
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_symlink():
                info = zipfile.ZipInfo(str(file.relative_to(folder)))
                info.external_attr = (stat.S_IFLNK | 0o777) << 16
                archive.writestr(info, os.readlink(file))
            elif file.is_file():
                archive.write(file, file.relative_to(folder))


def test_unreadable_images_and_published_layouts_are_counted_too(folder, tmp_path):
    put(folder / "cat/bad.png")
    skip = dataclasses.replace(ONE, on_error="skip")
    assert build(f"folder:{folder}", tmp_path / "d", skip).manifest.left_out == {"unreadable images": 1}
    assert build(f"folder:{to_zip(folder, tmp_path / 'x.zip')}", tmp_path / "z", skip).manifest.left_out == {
        "unreadable images": 1
    }


def test_a_name_of_two_lines_is_said_on_one(folder, tmp_path):
    put(folder / "cat/bad\nname: \x1b[2Jx.png")
    put(folder / f"dog/{'long' * 60}.png")
    with pytest.raises(UserError, match=r"cannot read cat/bad\\nname: \\x1b\[2Jx\.png \(.*\), and 1 more; repair"):
        build(f"folder:{folder}", tmp_path / "d", ONE)
    lines: list[str] = []
    build(f"folder:{folder}", tmp_path / "d", dataclasses.replace(ONE, on_error="skip"), log=lines.append)
    skipped = [line for line in lines if line.startswith("skipped ")]
    assert [line.partition(".png: ")[0] for line in skipped] == [
        "skipped cat/bad\\nname: \\x1b[2Jx",
        f"skipped dog/{'long' * 60}",
    ]
    assert not any("\n" in line for line in lines)


def test_some_classes_alone(tmp_path):
    folder = write_folder(tmp_path / "s", {"a": 10, "b": 10, "c": 10, "7": 10})
    first = build(f"folder:{folder}", tmp_path / "first", dataclasses.replace(ONE, classes=("2",))).manifest
    assert (first.classes, first.left_out) == (("7", "a"), {"images of other classes": 20})
    named = build(f"folder:{folder}", tmp_path / "named", dataclasses.replace(ONE, classes=("c", "7"))).manifest
    assert named.classes == ("c", "7")
    assert sorted(stored(tmp_path / "named")) == sorted([*_pixels(folder, "c", 0), *_pixels(folder, "7", 1)])
    assert first.fingerprint != named.fingerprint
    for wrong, message in (
        ("5", "has 4 classes"),
        ("0", "has 4 classes"),
        ("d", "d is not a class of s"),
        ("1", "only the class 7"),
    ):
        with pytest.raises(UserError, match=message):
            build(f"folder:{folder}", tmp_path / "no", dataclasses.replace(ONE, classes=(wrong,)))
    with pytest.raises(UserError, match="a is named twice"):
        build(f"folder:{folder}", tmp_path / "no", dataclasses.replace(ONE, classes=("a", "a")))
