import gzip
import io
import os
import tarfile
import zipfile

import numpy as np
import pytest
from test_sharding_support import contents, encoded, pixels, to_tar, to_zip, write_folder

from sharding.containers import LARGEST_FILE, base_name, open_files
from sharding.errors import UserError
from sharding.links import Member
from sharding.options import Options
from sharding.shards import Shards, decode
from sharding.sources import open_source
from sharding.tars import BLOCK, entries, padded
from sharding.writer import build

SPLIT = {"train/b": 4, "train/a": 4, "val/a": 2, "val/b": 2, "test/a": 3, "test/b": 3}
ONE = Options(workers=1)


def cut(data: bytes, left: int) -> bytes:
    """A tar without its closing zero blocks but for ``left`` bytes of them."""
    return data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % BLOCK) + bytes(left)


def listed(path, scratch) -> dict[str, list[tuple[str, int]]]:
    listing = open_source(f"folder:{path}", scratch)
    return {
        split: [(sample.member.name, sample.label) for sample in samples] for split, samples in listing.splits.items()
    }


@pytest.mark.parametrize("counts", [SPLIT, {"train/a": 6, "train/b": 6}, {"a": 6, "b": 6, "c c/deep/er": 6}])
def test_a_directory_and_every_kind_of_archive_give_the_same_shards(tmp_path, counts):
    folder = write_folder(tmp_path / "name", counts)
    (tmp_path / "dotted").mkdir()
    paths = {
        "folder": folder,
        "tar": to_tar(folder, tmp_path / "name.tar", top="name"),
        "dotted tar": to_tar(folder, tmp_path / "dotted" / "name.tar", top="."),
        "gz": to_tar(folder, tmp_path / "name.tar.gz", top="x/y", mode="w:gz"),
        "xz": to_tar(folder, tmp_path / "name.tar.xz", mode="w:xz"),
        "zip": to_zip(folder, tmp_path / "name.zip"),
    }
    options = Options(workers=1, test_fraction=None if "test/a" in counts else 0.2)
    outcomes = []
    for kind, path in paths.items():
        build(f"folder:{path}", tmp_path / f"out {kind}", options)
        outcomes.append(contents(tmp_path / f"out {kind}"))
    assert all(outcome == outcomes[0] for outcome in outcomes)
    assert all(not (tmp_path / f"out {kind}" / ".build").exists() for kind in paths)


def test_a_source_with_its_own_splits_keeps_them(tmp_path):
    manifest = build(f"folder:{write_folder(tmp_path / 's', SPLIT)}", tmp_path / "d", ONE).manifest
    assert manifest.classes == ("a", "b")
    assert {name: split.class_counts for name, split in manifest.splits.items()} == {
        "train": (4, 4),
        "val": (2, 2),
        "test": (3, 3),
    }


def test_hidden_and_other_files_are_left_out(tmp_path):
    folder = write_folder(tmp_path / "s", SPLIT)
    before = listed(folder, tmp_path)
    for name in (
        ".DS_Store",
        "train/.a/x.png",
        "train/a/._0.png",
        "__MACOSX/s/x.png",
        "train/a/boxes.txt",
        "README.md",
    ):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(b"x")
    assert listed(folder, tmp_path) == before


def test_single_top_level_directories_are_entered_and_a_class_may_be_called_train(tmp_path):
    folder = write_folder(tmp_path / "s", {"outer/inner/train": 2, "outer/inner/plane": 2})
    (folder / "outer/README").write_text("x")
    assert [label for _, label in listed(folder, tmp_path)["train"]] == [0, 0, 1, 1]
    assert open_source(f"folder:{folder}", tmp_path).classes == ("plane", "train")


def test_links_are_followed_but_not_for_ever(tmp_path):
    folder = write_folder(tmp_path / "s", {"a": 2})
    write_folder(tmp_path / "elsewhere", {"b": 2})
    (folder / "b").symlink_to(tmp_path / "elsewhere/b")
    (folder / "a" / "loop").symlink_to(folder)
    (folder / "a" / "9.png").symlink_to(folder / "a" / "0000.png")
    names = [name for name, _ in listed(folder, tmp_path)["train"]]
    assert names == ["a/0000.png", "a/0001.png", "a/9.png", "b/0000.png", "b/0001.png"]


def test_links_in_a_tar_stand_for_what_they_point_at(tmp_path):
    data = {"a/1.png": encoded(pixels(1)), "b/2.png": encoded(pixels(2))}
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name, payload in data.items():
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
        for name, kind, target in (
            ("a/hard.png", tarfile.LNKTYPE, "b/2.png"),
            ("b/soft.png", tarfile.SYMTYPE, "../a/1.png"),
            ("b/gone.png", tarfile.SYMTYPE, "/etc/passwd"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    files = open_files(str(tmp_path / "s.tar"), tmp_path)
    members = {member.name: member for member in files.listing()[0]}
    assert files.read(members["a/hard.png"]) == data["b/2.png"]
    assert files.read(members["b/soft.png"]) == data["a/1.png"]
    with pytest.raises(ValueError, match="link"):
        files.read(members["b/gone.png"])


@pytest.mark.parametrize(
    ("counts", "empty", "message"),
    [
        ({"train/a": 2, "train/b": 2}, ["train/c"], "class c is empty"),
        ({"train/a": 2, "train/b": 2, "test/a": 2}, ["test/b"], "class b is empty"),
        ({"train/a": 2, "train/b": 2, "test/c": 2}, [], "class c is in .*test of .* but not in train"),
        ({"val/a": 2, "test/a": 2}, [], "has val and test but no train"),
        ({"a": 2}, [], "only the class a"),
        ({".": 2}, [], "no class directory|only the class s;"),
        ({"train": 2, "test": 2}, [], "no class directory"),
        ({}, [], "no class directory|only the class s;"),
    ],
)
@pytest.mark.parametrize("archive", [False, True])
def test_wrong_layouts_are_named(tmp_path, counts, empty, message, archive):
    (tmp_path / "s").mkdir()
    folder = write_folder(tmp_path / "s", counts)
    for name in empty:
        (folder / name).mkdir(parents=True)
    path = to_tar(folder, tmp_path / "s.tar", top="s") if archive else folder
    with pytest.raises(UserError, match=message):
        open_source(f"folder:{path}", tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda data: b"", "is empty"),
        (lambda data: b"hello" * 200, "is not a complete tar archive"),
        (lambda data: data[: len(data) // 2], "is not a complete tar archive"),
        (
            lambda data: cut(data, 0),
            "is not a complete tar archive .*before its two closing zero blocks: it is truncated",
        ),
        (
            lambda data: cut(data, BLOCK),
            "is not a complete tar archive .*before the second of its two closing zero blocks",
        ),
        (lambda data: cut(data, 0) + b"x" * BLOCK + data, "is not a complete tar archive .*is not a header"),
        (lambda data: data + b"more", "is not a complete tar archive .*there are bytes after its end"),
        (
            lambda data: data + data,
            r"cannot be read as it is: a second archive begins at byte \d+; unpack it \(tar -xif\)",
        ),
        (lambda data: gzip.compress(data)[:-20], "is damaged"),
        (lambda data: b"\x1f\x8b" + b"rubbish" * 99, "is damaged"),
        (lambda data: b"PK\x03\x04" + b"rubbish" * 99, "is not a complete zip archive"),
    ],
)
def test_damaged_archives_are_named(tmp_path, make, message):
    data = to_tar(write_folder(tmp_path / "s", SPLIT), tmp_path / "s.tar").read_bytes()
    (tmp_path / "x.bin").write_bytes(make(data))
    with pytest.raises(UserError, match=rf"x\.bin {message}"):
        open_source(f"folder:{tmp_path / 'x.bin'}", tmp_path)


@pytest.mark.parametrize("source", ["folder", "tiny-imagenet"])
def test_a_tar_that_was_cut_between_two_members_is_refused_by_every_source(tmp_path, source):
    data = to_tar(write_folder(tmp_path / "s", SPLIT), tmp_path / "s.tar").read_bytes()
    *_, before, last = entries(tmp_path / "s.tar")
    (tmp_path / "x.tar").write_bytes(data[: before.offset + padded(before.size)])
    with tarfile.open(tmp_path / "x.tar") as archive:
        assert last.name not in archive.getnames()  # what reads as a whole archive, one image short
    with pytest.raises(UserError, match=r"x\.tar is not a complete tar archive .*it is truncated"):
        open_source(f"{source}:{tmp_path / 'x.tar'}", tmp_path)


def test_links_with_long_names_lead_where_they_say(tmp_path):
    for number, form in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        path, name = tmp_path / f"{number}.tar", "a/" + "x" * 150 + ".png"
        with tarfile.open(path, "w", format=form) as archive:
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
            info = tarfile.TarInfo("b/soft.png")
            info.type, info.linkname = tarfile.SYMTYPE, f"../{name}"
            archive.addfile(info)
        files = open_files(str(path), tmp_path)
        assert [files.read(member) for member in files.listing()[0]] == [b"abc", b"abc"]


def test_a_damaged_or_locked_zip_member_is_unreadable(tmp_path):
    folder = write_folder(tmp_path / "s", SPLIT)
    path = to_zip(folder, tmp_path / "s.zip")
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("train/a/0000.png").header_offset
    data[start + 60] ^= 255
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"cannot read train/a/0000\.png \("):
        build(f"folder:{path}", tmp_path / "d", ONE)


def test_files_too_large_for_an_image_are_unreadable(tmp_path):
    files = open_files(str(tmp_path), tmp_path)
    with pytest.raises(ValueError, match="larger than 256 MiB"):
        files.read(Member("x", LARGEST_FILE + 1))


def test_a_missing_path_and_an_unreadable_directory_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        open_source(f"folder:{tmp_path / 'nowhere'}", tmp_path)
    if os.geteuid():
        (tmp_path / "s/a").mkdir(parents=True, mode=0)
        with pytest.raises(UserError, match="cannot read"):
            open_source(f"folder:{tmp_path / 's'}", tmp_path)


@pytest.mark.parametrize(
    ("path", "name"), [("x/data.tar", "data"), ("data.v2.tar.gz", "data.v2"), ("a.ZIP", "a"), ("x/plain", "plain")]
)
def test_the_name_of_a_folder_is_its_base_name_without_the_suffix_of_an_archive(path, name):
    assert base_name(path) == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown source ''; give one of digits | cifar10:PATH"),
        ("webdataset:x", "x does not exist; check the pattern"),
        ("Digits", "unknown source"),
        ("folder", "lacks its path; write folder:PATH"),
        ("folder:", "lacks its path"),
        ("digits:x", "digits takes no path"),
    ],
)
def test_unknown_sources_get_a_list_of_known_ones(tmp_path, text, message):
    with pytest.raises(UserError, match=message.replace("|", r"\|")):
        open_source(text, tmp_path)


def tiny(root, *, annotated: bool = True):
    """Tiny ImageNet's published layout with three classes."""
    wnids = ["n03", "n01", "n02"]
    write_folder(root, {f"train/{wnid}/images": 6 for wnid in wnids})
    write_folder(root, {"val/images": 6, "test/images": 2}, seed=1)
    for wnid in wnids:
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("0000.png\t0\t0\t1\t1\n")
    (root / "wnids.txt").write_text("\n".join(wnids))
    (root / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\tcrane\nn03\tcrane, machine\nn99\tother\n")
    lines = [f"{i:04d}.png\t{wnids[i % 3]}\t0\t0\t1\t1" for i in range(6 if annotated else 5)]
    (root / "val/val_annotations.txt").write_text("\n".join(lines) + "\nabsent.png\tn01\t0\t0\t1\t1\n")
    return root


@pytest.mark.parametrize("archive", [False, True])
def test_tiny_imagenet_is_read_in_its_published_layout(tmp_path, archive):
    path = tiny(tmp_path / "tiny-imagenet-200")
    if archive:
        path = to_zip(tmp_path / "tiny-imagenet-200", tmp_path / "t.zip")
    manifest = build(f"tiny-imagenet:{path}", tmp_path / "d", ONE).manifest
    assert manifest.name == "tiny-imagenet"
    assert manifest.classes == ("goldfish", "crane (n02)", "crane (n03)")
    assert manifest.left_out == {".txt files": 3, "images in test": 2}
    assert {name: split.class_counts for name, split in manifest.splits.items()} == {
        "train": (5, 5, 5),
        "val": (1, 1, 1),
        "test": (2, 2, 2),
    }


@pytest.mark.parametrize("missing", ["wnids.txt", "words.txt", "val/val_annotations.txt", "train/n02"])
def test_what_tiny_imagenet_lacks_is_named(tmp_path, missing):
    path = tiny(tmp_path / "t")
    (path / missing).rename(tmp_path / "gone")
    with pytest.raises(UserError, match=missing.rpartition("/")[2]):
        open_source(f"tiny-imagenet:{path}", tmp_path)


def test_an_image_of_tiny_imagenet_without_annotation_is_named(tmp_path):
    with pytest.raises(UserError, match=r"val/images/0005\.png .* is not in val_annotations"):
        open_source(f"tiny-imagenet:{tiny(tmp_path / 't', annotated=False)}", tmp_path)


def test_digits_are_the_digits(tmp_path):
    from sklearn.datasets import load_digits

    manifest = build("digits", tmp_path / "d", ONE).manifest
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 1197, "val": 240, "test": 360}
    assert (manifest.height, manifest.width, manifest.channels) == (16, 16, 1)
    assert manifest.classes == tuple("0123456789")
    images, labels = load_digits(return_X_y=True)
    whole = np.bincount(labels) / len(labels)
    seen = []
    for name, split in manifest.splits.items():
        assert np.abs(np.array(split.class_counts) - whole * split.samples).max() <= 1
        shards = Shards(tmp_path / "d", manifest, name)
        for i in range(shards.samples):
            out = np.empty((16, 16, 1), np.uint8)
            decode(shards.payload(i), out)
            # Halving what was doubled blurs: the mean stays, but for rounding and the borders.
            seen.append((int(shards.labels[i]), round(float(out.mean()) / 255 * 16, 1)))
    expected = [(int(label), round(float(image.mean()), 1)) for image, label in zip(images, labels, strict=True)]
    gaps = np.array([m for _, m in sorted(seen)]) - np.array([m for _, m in sorted(expected)])
    assert len(seen) == 1797
    assert np.abs(gaps).max() < 0.3
