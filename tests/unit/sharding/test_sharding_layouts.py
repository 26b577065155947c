"""Directories as people call them: splits in any spelling, classes called like splits, names in any bytes."""

import json
import os
import unicodedata
import zipfile

import numpy as np
import pytest
from PIL import Image
from test_sharding_left_out import stored
from test_sharding_support import encoded, pixels, run, to_tar, to_zip, write_folder

from sharding.errors import UserError
from sharding.folders import split_in, split_of
from sharding.manifest import Manifest
from sharding.options import Options
from sharding.writer import build

CUT = Options(workers=1, test_fraction=0.2)


def counts(source, dest, options=CUT, log=None):
    manifest = build(f"folder:{source}", dest, options, log=log).manifest
    return manifest.classes, {name: split.samples for name, split in manifest.splits.items()}


@pytest.mark.parametrize(
    ("name", "split"),
    [("train", "train"), ("Training", "train"), ("training_set", "train"), ("TRAIN-data", "train"), ("val", "val")]
    + [
        ("Valid", "val"),
        ("validation", "val"),
        ("dev", "val"),
        ("test", "test"),
        ("Testing", "test"),
        ("test images", "test"),
    ]
    + [("trainer", None), ("steam train", None), ("invalid", None), ("tested", None), ("a", None)],
)
def test_splits_are_told_by_their_names_in_any_case(name, split):
    assert split_of(name) == split


@pytest.mark.parametrize(
    "names",
    [
        ("Training", "Valid", "Testing"),
        ("train", "validation", "test"),
        ("TRAIN", "Val", "TEST"),
        ("train_set", "dev", "test_set"),
    ],
)
def test_each_spelling_of_the_splits_gives_the_same(tmp_path, names):
    folder = write_folder(tmp_path / "s", {f"{names[i]}/{c}": n for i, n in enumerate((8, 3, 4)) for c in "ab"})
    lines: list[str] = []
    expected = ("a", "b"), {"train": 16, "val": 6, "test": 8}
    assert counts(folder, tmp_path / "d", Options(workers=1), lines.append) == expected
    assert any("are read as splits; --layout classes reads them as classes" in line for line in lines)


def test_two_spellings_of_one_split_are_not_joined_without_a_word(tmp_path):
    folder = write_folder(tmp_path / "s", {f"{s}/{c}": 2 for s in ("train", "val", "valid", "test") for c in "ab"})
    with pytest.raises(UserError, match="val and valid of .* are both read as val"):
        counts(folder, tmp_path / "d", Options())


def test_a_class_called_train_with_directories_of_its_own_hides_no_other(tmp_path):
    folder = write_folder(tmp_path / "s", {"plane": 6, "ship": 6, "train/steam": 6, "train/diesel": 6})
    lines: list[str] = []
    assert counts(folder, tmp_path / "d", log=lines.append)[0] == ("plane", "ship", "train")
    assert "train and plane, ship are read as classes; --layout splits reads train as splits" in lines
    options = Options(workers=1, test_fraction=0.2, layout="splits")
    manifest = build(f"folder:{folder}", tmp_path / "e", options).manifest
    assert manifest.classes == ("diesel", "steam")
    assert manifest.left_out == {"images in plane": 6, "images in ship": 6}


def test_splits_beside_other_images_are_splits_and_it_is_said(tmp_path):
    folder = write_folder(
        tmp_path / "s", {"train/a": 6, "train/b": 6, "test/a": 3, "test/b": 3, "extra": 4, "train/c/": 2}
    )
    lines: list[str] = []
    manifest = build(f"folder:{folder}", tmp_path / "d", Options(workers=1), log=lines.append).manifest
    assert (manifest.classes, manifest.left_out) == (("a", "b", "c"), {"images in extra": 4})
    assert "test, train are read as splits, extra left out; --layout classes reads all of them as classes" in lines
    options = Options(workers=1, test_fraction=0.2, layout="classes")
    assert counts(folder, tmp_path / "e", options)[0] == ("extra", "test", "train")


SHARED = "read as classes, though they hold directories of the same names; "
LAY_OUT = "for splits, lay them out as PATH/train/CLASS/IMAGE and PATH/test/CLASS/IMAGE"


@pytest.mark.parametrize(
    ("names", "note"),
    [
        (("fold1/a", "fold1/b", "fold2/a", "fold2/b"), f"fold1, fold2: {SHARED}{LAY_OUT}"),
        (
            ("train_dataset/a", "train_dataset/b", "test_dataset/a", "test_dataset/b"),
            f"test_dataset, train_dataset: {SHARED}--layout splits reads test_dataset as test, train_dataset as train",
        ),
        (
            ("cat/train", "cat/test", "dog/train", "dog/test"),
            f"cat, dog: read as classes, with all images of test in them; {LAY_OUT}",
        ),
        (
            ("data/train/a", "data/train/b", "data/test/a", "data/test/b", "docs"),
            f"data: read as classes, with all images of test in them; give folder:PATH/data, or {LAY_OUT}",
        ),
        (("train", "test", "unlabeled"), f"test, train: read as classes, though called like splits; {LAY_OUT}"),
        (("plane/jet", "plane/prop", "rail/train", "rail/tram"), None),
        (("cat/front", "dog/front"), None),
    ],
)
def test_classes_that_may_be_splits_are_said_and_classes_they_stay(tmp_path, names, note):
    folder = write_folder(tmp_path / "s", dict.fromkeys(names, 5))
    lines: list[str] = []
    plain = build(f"folder:{folder}", tmp_path / "d", CUT, log=lines.append).manifest
    assert plain.classes == tuple(sorted({name.partition("/")[0] for name in names}))
    assert [line for line in lines if "read as" in line] == ([note] if note else [])
    told = Options(workers=1, test_fraction=0.2, layout="classes")
    lines.clear()
    assert build(f"folder:{folder}", tmp_path / "e", told, log=lines.append).manifest == plain
    assert not [line for line in lines if "read as" in line]


def test_splits_by_longer_names_are_read_where_they_are_asked_for(tmp_path):
    names = {"seg_train/seg_train/a": 6, "seg_train/seg_train/b": 6, "seg_test/seg_test/a": 3, "seg_test/seg_test/b": 3}
    folder = write_folder(tmp_path / "s", names | {"seg_pred/seg_pred": 5})
    lines: list[str] = []
    assert counts(folder, tmp_path / "d", log=lines.append)[0] == ("seg_pred", "seg_test", "seg_train")
    assert f"seg_test, seg_train: {SHARED}--layout splits reads seg_test as test, seg_train as train" in lines
    splits = Options(workers=1, val_fraction=0.2, layout="splits")
    manifest = build(f"folder:{folder}", tmp_path / "e", splits).manifest
    assert (manifest.classes, manifest.left_out) == (("a", "b"), {"images in seg_pred": 5})
    assert manifest.splits["test"].class_counts == (3, 3)
    assert [split_in(name) for name in ("val2017", "images-test", "train_val", "steam")] == ["val", "test", None, None]


def test_a_split_that_repeats_its_own_name_is_entered_but_its_only_class_is_not(tmp_path):
    names = {f"{s}_set/{s}_set/{c}": n for s, n in (("training", 6), ("test", 3)) for c in ("cats", "dogs")}
    folder = write_folder(tmp_path / "s", names)
    assert counts(folder, tmp_path / "d", Options(workers=1)) == (("cats", "dogs"), {"train": 10, "val": 2, "test": 6})
    folder = write_folder(tmp_path / "t", {"train/a/x": 4, "train/a/y": 4, "train/b": 6, "test/a/x": 3, "test/a/y": 3})
    assert counts(folder, tmp_path / "e", Options(workers=1))[1]["test"] == 6


@pytest.mark.parametrize(
    ("more", "options", "refused"),
    [
        ({}, {"test_fraction": 0.2}, "already has a test set"),
        ({}, {"classes": ("extra",)}, "extra is not a class of s"),
        ({"test/b/": 0, "train/c/": 0}, {}, "class c is empty"),
    ],
)
def test_how_the_directories_were_read_is_said_before_a_refusal(tmp_path, more, options, refused):
    names = {"train/a": 6, "train/b": 6, "test/a": 3, "test/b": 3, "extra": 4}
    folder = write_folder(tmp_path / "s", names | more)
    lines: list[str] = []
    with pytest.raises(UserError, match=refused):
        counts(folder, tmp_path / "d", Options(workers=1, **options), lines.append)
    assert lines == ["test, train are read as splits, extra left out; --layout classes reads all of them as classes"]


def test_a_stray_image_in_train_does_not_hide_its_classes(tmp_path):
    folder = write_folder(tmp_path / "s", {"train/a": 6, "train/b": 6, "train": 1, "test/a": 3, "test/b": 3})
    manifest = build(f"folder:{folder}", tmp_path / "d", Options(workers=1)).manifest
    assert (manifest.classes, manifest.left_out) == (("a", "b"), {"images in train": 1})


def test_images_of_test_without_a_class_are_left_out_and_counted(tmp_path):
    folder = write_folder(tmp_path / "s", {"train/a": 6, "train/b": 6, "test": 5})
    manifest = build(f"folder:{folder}", tmp_path / "d", CUT).manifest
    assert (manifest.classes, manifest.left_out) == (("a", "b"), {"images in test": 5})


def test_classes_called_like_splits_alone_are_asked_about(tmp_path):
    folder = write_folder(tmp_path / "s", {"train": 6, "test": 6})
    with pytest.raises(UserError, match=r"no class directory; .*images in test 6, images in train 6"):
        counts(folder, tmp_path / "d")
    options = Options(workers=1, test_fraction=0.2, layout="classes")
    assert counts(folder, tmp_path / "d", options)[0] == ("test", "train")
    with pytest.raises(UserError, match="has no split but no train"):
        counts(folder, tmp_path / "e", Options(layout="splits"))
    for source in ("digits", f"tiny-imagenet:{folder}"):
        with pytest.raises(UserError, match="--layout works only with folder: sources"):
            build(source, tmp_path / "e", options)


def test_a_stray_image_beside_the_only_directory_changes_nothing(tmp_path):
    folder = write_folder(tmp_path / "s", {"data/a": 6, "data/b": 6, ".": 1, "data": 1})
    for number, path in enumerate((folder, to_tar(folder, tmp_path / "s.tar", top="x/y"))):
        manifest = build(f"folder:{path}", tmp_path / str(number), CUT).manifest
        assert (manifest.classes, manifest.left_out) == (("a", "b"), {"images outside all directories": 2})


def test_one_name_in_two_unicode_forms_is_one_class(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    folder = write_folder(tmp_path / "s", {f"train/{composed}": 6, "train/b": 6, f"test/{decomposed}": 3, "test/b": 3})
    write_folder(folder, {f"train/{decomposed}": 2}, seed=1)
    for number, path in enumerate((folder, to_tar(folder, tmp_path / "s.tar"), to_zip(folder, tmp_path / "s.zip"))):
        lines: list[str] = []
        manifest = build(
            f"folder:{path}", tmp_path / str(number), Options(workers=1, val_fraction=0.2), log=lines.append
        ).manifest
        assert manifest.classes == ("b", composed)
        assert manifest.splits["train"].class_counts[1] + manifest.splits["val"].class_counts[1] == 8
        assert manifest.splits["test"].class_counts == (3, 3)
        assert any("one class: café" in line for line in lines)


def test_a_name_in_one_unicode_form_stays_as_it_is_and_may_be_asked_for_in_any(tmp_path):
    decomposed = unicodedata.normalize("NFD", "café")
    folder = write_folder(tmp_path / "s", {decomposed: 6, "b": 6, "c": 6})
    assert counts(folder, tmp_path / "d")[0] == ("b", "c", decomposed)
    asked = [("café", "b"), (decomposed, "b")]
    made = [
        build(f"folder:{folder}", tmp_path / f"{i}", Options(workers=1, test_fraction=0.2, classes=names)).manifest
        for i, names in enumerate(asked)
    ]
    assert made[0] == made[1]
    assert made[0].classes == (decomposed, "b")
    with pytest.raises(UserError, match="is named twice"):
        counts(folder, tmp_path / "e", Options(test_fraction=0.2, classes=("café", decomposed)))


def test_names_that_are_not_utf8_are_written_so_that_they_can_be_and_found_again(tmp_path):
    folder = tmp_path / "s"
    for name in (b"caf\xe9", b"tea"):
        os.makedirs(os.fsencode(folder) + b"/" + name)
        for i in range(6):
            with open(os.fsencode(folder) + b"/" + name + b"/%d\xff.png" % i, "wb") as stream:
                stream.write(encoded(pixels(i + len(name))))
    done = run("build", f"folder:{folder}", tmp_path / "d", "--test-fraction", "0.2")
    assert done.returncode == 0
    assert "not UTF-8 are written with escaped bytes such as \\xe9: caf\\xe9" in done.stderr
    assert done.stdout.splitlines()[1] == "2 classes: caf\\xe9 6, tea 6"
    assert Manifest.load(tmp_path / "d").classes == ("caf\\xe9", "tea")
    assert json.loads((tmp_path / "d/manifest.json").read_bytes().decode())["classes"][0]["name"] == "caf\\xe9"
    expected = [(pixels(i + n).tobytes(), n == 3) for n in (4, 3) for i in range(6)]
    assert stored(tmp_path / "d") == sorted(expected)
    for number, path in enumerate((to_tar(folder, tmp_path / "s.tar"),)):
        assert (
            build(f"folder:{path}", tmp_path / str(number), CUT).manifest.to_json()
            == Manifest.load(tmp_path / "d").to_json()
        )


def test_a_source_whose_own_name_is_not_utf8_can_be_named(tmp_path):
    folder = write_folder(tmp_path / "s", {"a": 6, "b": 6})
    os.rename(folder, os.fsencode(tmp_path) + b"/\xe9")
    assert build(f"folder:{tmp_path}/\udce9", tmp_path / "d", CUT).manifest.name == "\\xe9"


def test_a_picture_in_two_classes_or_two_splits_is_said(tmp_path):
    folder = write_folder(tmp_path / "s", {"train/a": 6, "train/b": 6, "test/a": 3, "test/b": 3})
    for twin in ("train/b/same.png", "test/a/same.png"):
        (folder / twin).write_bytes((folder / "train/a/0000.png").read_bytes())
    lines: list[str] = []
    build(f"folder:{folder}", tmp_path / "d", Options(workers=1, val_fraction=0.2), log=lines.append)
    said = [line for line in lines if line.startswith("images found in two")]
    assert len(said) == 2
    assert all("1 (" in line and "same.png" in line for line in said)


def test_a_tilde_behind_a_colon_is_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_folder(tmp_path / "pics", {"a": 6, "b": 6})
    monkeypatch.chdir(tmp_path)
    assert run("build", "folder:~/pics", "~/d e", "--test-fraction", "0.2").returncode == 0
    assert Manifest.load(tmp_path / "d e").classes == ("a", "b")
    assert not (tmp_path / "~").exists()


def test_pixels_of_an_archive_with_names_from_windows(tmp_path):
    folder = write_folder(tmp_path / "s", {"a": 6, "b": 6})
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        for path in sorted(folder.rglob("*.png")):
            info = zipfile.ZipInfo("x")
            info.filename = info.orig_filename = str(path.relative_to(folder)).replace("/", "\\")
            info.create_system = 0
            archive.writestr(info, path.read_bytes())
    for number, path in enumerate((folder, tmp_path / "s.zip")):
        build(f"folder:{path}", tmp_path / str(number), CUT)
    assert stored(tmp_path / "0") == stored(tmp_path / "1")
    assert np.asarray(Image.open(folder / "a/0000.png")).tobytes() in [
        x for x, label in stored(tmp_path / "1") if label == 0
    ]


def zip_of(path, names: list[bytes], system: int = 0):
    """A zip whose members have these bytes as names, not marked as UTF-8, and pixels(i) as content."""
    with zipfile.ZipFile(path, "w") as archive:
        for i, name in enumerate(names):
            info = zipfile.ZipInfo("x")
            info.filename = info.orig_filename = "".join(f"{i:03d}" + "x" * (len(name) - 3))
            info.create_system = system
            archive.writestr(info, encoded(pixels(i)))
    data = path.read_bytes()
    for i, name in enumerate(names):
        data = data.replace((f"{i:03d}" + "x" * (len(name) - 3)).encode(), name)
    path.write_bytes(data)
    return path


EAST = {"cp932": ["ソース", "ソフト", "tea"], "gbk": ["擻a", "擻b", "tea"], "cp950": ["功a", "功b", "tea"]}


@pytest.mark.parametrize("encoding", EAST)
def test_a_backslash_that_is_half_a_character_separates_no_names(encoding, tmp_path):
    classes = [name.encode(encoding) for name in EAST[encoding]]
    assert sum(b"\\" in name for name in classes) == 2
    names = [name + b"/%02d.png" % i for name in classes for i in range(6)]
    manifest = build(f"folder:{zip_of(tmp_path / 's.zip', names)}", tmp_path / "d", CUT).manifest
    labels = [sorted(name.decode("cp437") for name in classes).index(name.decode("cp437")) for name in classes]
    assert stored(tmp_path / "d") == sorted((pixels(i).tobytes(), labels[i // 6]) for i in range(18))
    assert len(manifest.classes) == 3
    separated = [name.replace(b"/", b"\\") for name in names]
    with pytest.raises(
        UserError, match="a backslash in .* is the half of a character; unpack it and give the directory"
    ):
        build(f"folder:{zip_of(tmp_path / 'w.zip', separated)}", tmp_path / "w", CUT)


@pytest.mark.parametrize("extra", [[], [b"tea/me.txt"]])
def test_other_backslashes_of_windows_separate(extra, tmp_path):
    classes = ["狗".encode("gbk"), "猫犬".encode("cp932"), "café".encode(), b"tea"]
    names = [name + b"\\%02d.png" % i for name in classes for i in range(6)]
    build(f"folder:{zip_of(tmp_path / 's.zip', names + extra)}", tmp_path / "d", CUT)
    counts = {text: label for label, text in enumerate(Manifest.load(tmp_path / "d").classes)}
    assert len(counts) == 4
    labels = [counts[text] for text in (classes[0].decode("cp437"), classes[1].decode("cp437"), "café", "tea")]
    assert stored(tmp_path / "d") == sorted((pixels(i).tobytes(), labels[i // 6]) for i in range(24))
