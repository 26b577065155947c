"""WebDataset tars that others made: the same samples as stock webdataset finds, in place where they fit."""

import io
import json
import shlex
import shutil
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image
from tars import image, labelled, samples, tar

from sharding.errors import UserError
from sharding.foreign import TarSet
from sharding.foreign import samples as listed
from sharding.manifest import Manifest
from sharding.options import Options
from sharding.patterns import split_patterns, tars
from sharding.shards import Shards, decode
from sharding.verify import verify
from sharding.writer import build


def silent(_line):
    """No log."""


def everything(data, *splits):
    """(payload, label) of every sample, sorted."""
    manifest = Manifest.load(data)
    shards = [Shards(data, manifest, split) for split in splits or manifest.splits]
    return sorted((bytes(s.payload(i)), int(s.labels[i])) for s in shards for i in range(s.samples))


def stock(paths):
    """(bytes, label) of every sample, as stock webdataset finds them, sorted."""
    found = []
    for sample in webdataset.WebDataset([str(p) for p in paths], shardshuffle=False, empty_check=False):
        kinds = [k for k in sample if k in ("jpg", "jpeg", "png", "webp")]
        if sample["__key__"] == "__meta__":  # stock takes such a file for a sample
            continue
        label = sample["cls"] if "cls" in sample else str(json.loads(sample["json"])["label"])
        found.append((sample[kinds[0]], int(label)))
    return sorted(found)


def turned(payload):
    """The same JPEG with metadata that says it lies on its side."""
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.open(io.BytesIO(payload)).save(stream, "JPEG", exif=exif)
    return stream.getvalue()


def mixed():
    """Files in every form that the issue names."""
    return {
        "./a.b/c/one.jpeg": image(1),
        "./a.b/c/one.cls": b"0",
        "a.b/two.JPG": image(2),
        "a.b/two.txt": b"a caption",
        "a.b/two.seg.png": b"no image of ours",
        "a.b/two.json": b'{"label": 1, "more": [1, 2]}',
        "three.png": image(3, "PNG"),
        "three.cls": b"2\n",
        "three.pyd": b"never read",
        "four.webp": image(4, "WEBP"),
        "four.json": b'{"label": "1"}',
        "__meta__.json": b"{}",
        "noextension": b"x",
        ".hidden.jpg": b"x",
        "five.x.y.jpg": b"an extension of its own",
        "five.jpg": image(5),
        "five.cls": b"0",
        "n" * 120 + "/" + "m" * 90 + ".jpg": image(6),
        "n" * 120 + "/" + "m" * 90 + ".cls": b"1",
        "ü/ß.jpg": image(7),
        "ü/ß.cls": b"2",
    }


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_those_of_stock_webdataset(tmp_path, format):
    path = tar(tmp_path / "x.tar", mixed(), format)
    reader = TarSet([path])
    found = sorted((reader.read(s.member), s.label) for s in listed(path, 0, reader))
    assert len(found) == 7
    assert found == stock([path])


def test_headers_beyond_octal_and_long_pax_names_are_read(tmp_path):
    name = "d/" + "k" * 300 + ".jpg"
    path = tar(tmp_path / "x.tar", {name: image(0), name[:-3] + "cls": b"0"}, tarfile.PAX_FORMAT)
    (sample,) = listed(path, 0, TarSet([path]))
    assert sample.member.offset >= 1536
    assert TarSet([path]).read(sample.member) == image(0)


def test_patterns_name_the_tars_that_they_should(tmp_path):
    for i in (0, 1, 2, 10):
        tar(tmp_path / f"s-{i:03d}.tar", samples(i, 1))
    names = [p.name for p in tars(str(tmp_path))]
    assert names == ["s-000.tar", "s-001.tar", "s-002.tar", "s-010.tar"]
    assert [p.name for p in tars(str(tmp_path / "s-{000..002}.tar"))] == names[:3]
    assert [p.name for p in tars(str(tmp_path / "s-{010,001}.tar"))] == [names[3], names[1]]
    assert [p.name for p in tars(str(tmp_path / "s-00*.tar"))] == names[:3]
    for pattern, message in [("s-{000..003}.tar", "s-003.tar does not exist"), ("t*", "matches no file")]:
        with pytest.raises(UserError, match=message):
            tars(str(tmp_path / pattern))


@pytest.mark.parametrize(
    ("names", "pattern", "cure"),
    [
        (("s-train-0", "s-train-1", "s-val-0"), "", "train={0}/s-train-*.tar,val={0}/s-val-0.tar"),
        (("train/0", "train/1", "test/0", "test/1"), "/**/*.tar", "train={0}/train/*.tar,test={0}/test/*.tar"),
        (("0-train", "1-train", "0-test"), "", "train={0}/*-train.tar,test={0}/0-test.tar"),
        (("train0", "train1", "trainee", "test"), "", "train=GLOB,test={0}/test.tar"),
        (("val-0", "test-0"), "", "train=GLOB,val=GLOB,test=GLOB"),
        (("train-0", "train-1"), "", None),
        (("a", "b"), "", None),
    ],
)
def test_tars_of_several_splits_in_one_pattern_are_said_with_the_command_that_parts_them(
    tmp_path, names, pattern, cure
):
    for i, name in enumerate(names):
        tar(tmp_path / "in" / f"{name}.tar", samples(100 * i, 12))
    lines: list[str] = []
    options = Options(workers=1, test_fraction=0.2)
    built = build(f"webdataset:{tmp_path}/in{pattern}", tmp_path / "d", options, log=lines.append)
    assert sum(split.samples for split in built.manifest.splits.values()) == 12 * len(names)
    said = [line for line in lines if "are all read as train; " in line]
    if cure is None:
        assert not said
        return
    command = f"webdataset:{cure.format(tmp_path / 'in')}"
    assert [shlex.split(line.partition("; ")[2]) for line in said] == [[command, *"keeps the splits apart".split()]]
    if "GLOB" not in command:
        again: list[str] = []
        options = Options(workers=1) if "test=" in command else options
        assert len(build(command, tmp_path / "e", options, log=again.append).manifest.splits) == 3
        assert not any("read as" in line for line in again)


@pytest.mark.parametrize(
    ("pattern", "missing"),
    [
        ("{0..99999999999}", "2"),
        ("{00000..99999999999}", "00000000000"),
        ("{0..2}-{0..99999999}{0..99999999}", "0-00"),
        ("{1..-99999999}", "-1"),
        ("{0..99999999..2}", "2"),
    ],
)
def test_the_first_tar_that_a_range_too_wide_lacks_is_named_at_once(tmp_path, pattern, missing):
    for name in "01":
        tar(tmp_path / f"{name}.tar", samples(0, 1))
    with pytest.raises(UserError, match=rf"/{missing}\.tar does not exist"):
        tars(f"{tmp_path}/{pattern}.tar")


def test_more_names_than_a_pattern_may_stand_for_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sharding.patterns.MOST_NAMES", 3)
    made = [tar(tmp_path / f"{i:02d}.tar", samples(i, 1)) for i in range(8, 12)]
    assert tars(f"{tmp_path}/{{08..10}}.tar") == made[:3]
    for pattern in ("{08..11}", "{08..99}", "{08,09,10,11}"):
        with pytest.raises(UserError, match="names more than 3 tars; give several patterns"):
            tars(f"{tmp_path}/{pattern}.tar")


def test_two_asterisks_stand_for_any_number_of_directories(tmp_path):
    made = [tar(tmp_path / name, samples(i, 1)) for i, name in enumerate(("a.tar", "x/b.tar", "x/y/c.tar", "x/y.tar"))]
    assert tars(f"{tmp_path}/**/*.tar") == sorted(made, key=str)
    assert tars(f"{tmp_path}/{{x,x/y}}/*.tar") == [made[1], made[3], made[2]]


def test_splits_are_named_by_pattern():
    assert split_patterns("train=a,b-{0,1}.tar,test=c") == {"train": "a,b-{0,1}.tar", "test": "c"}
    assert split_patterns("a/b.tar") == {"train": "a/b.tar"}
    for wrong in ("test=a", "train=a,train=b", "train=,test=b"):
        with pytest.raises(UserError, match="each split once"):
            split_patterns(wrong)


@pytest.fixture
def source(tmp_path):
    for i in range(3):
        tar(tmp_path / "in" / f"train-{i}.tar", samples(100 * i, 30))
    tar(tmp_path / "in" / "test-0.tar", samples(1000, 12))
    return f"webdataset:train={tmp_path}/in/train-{{0..2}}.tar,test={tmp_path}/in/test-*.tar"


def test_tars_that_fit_are_indexed_where_they_lie(source, tmp_path):
    data = tmp_path / "data"
    manifest = build(source, data, Options(val_fraction=0.2, workers=1)).manifest
    assert {split: info.samples for split, info in manifest.splits.items()} == {"train": 72, "val": 18, "test": 12}
    assert manifest.name == "in"
    links = sorted(p for p in data.rglob("*.tar"))
    assert all(p.is_symlink() for p in links)
    assert {p.resolve() for p in links} == set((tmp_path / "in").glob("*.tar"))
    assert everything(data, "train", "val") == stock(sorted((tmp_path / "in").glob("train*")))
    assert everything(data, "test") == stock([tmp_path / "in/test-0.tar"])
    verify(data, deep=True, log=silent)
    assert build(source, data, Options(val_fraction=0.2, workers=1)).reused


def test_mean_and_std_are_those_of_the_train_rows_alone(source, tmp_path):
    manifest = build(source, tmp_path / "data", Options(val_fraction=0.2, workers=1)).manifest
    shards, out = Shards(tmp_path / "data", manifest, "train"), np.empty((8, 8, 3), np.uint8)
    pixels = []
    for i in range(shards.samples):
        decode(shards.payload(i), out)
        pixels.append(out.copy())
    assert np.allclose(np.mean(pixels, axis=(0, 1, 2)) / 255, manifest.mean)
    assert np.allclose(np.std(pixels, axis=(0, 1, 2)) / 255, manifest.std)


def test_a_foreign_tar_that_changes_later_is_named(source, tmp_path):
    data = tmp_path / "data"
    build(source, data, Options(val_fraction=0.2, workers=1))
    tar(tmp_path / "in/train-1.tar", samples(100, 29))
    with pytest.raises(UserError, match=r"00000[0-9]\.tar (holds \d+ bytes|was altered)"):
        verify(data, log=silent)


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ({"zz.jpg": image(9, size=9), "zz.cls": b"1"}, {"image_size": 8}),
        ({"zz.jpg": turned(image(9)), "zz.cls": b"1"}, {}),
        (None, {"image_size": 4}),
    ],
    ids=["another size", "turned by its metadata", "another size asked for"],
)
def test_tars_that_do_not_fit_are_rewritten(source, tmp_path, change, options):
    if change:
        tar(tmp_path / "in/train-1.tar", samples(100, 30) | change)
    data = tmp_path / "data"
    manifest = build(source, data, Options(val_fraction=0.2, workers=1, **options)).manifest
    assert not any(p.is_symlink() for p in data.rglob("*.tar"))
    assert manifest.splits["train"].samples + manifest.splits["val"].samples == 90 + bool(change)
    verify(data, deep=True, log=silent)


def test_grey_images_among_colours_lie_where_they_are(source, tmp_path):
    grey = image(9, mode="L")
    tar(tmp_path / "in/train-1.tar", samples(100, 30) | {"zz.jpg": grey, "zz.cls": b"1"})
    manifest = build(source, tmp_path / "data", Options(val_fraction=0.2, workers=1)).manifest
    assert manifest.channels == 3
    assert all(p.is_symlink() for p in (tmp_path / "data").rglob("*.tar"))
    assert (grey, 1) in everything(tmp_path / "data")


def test_one_pattern_is_split_and_rewritten(tmp_path):
    path = tar(tmp_path / "in" / "set-0.tar", samples(0, 30))
    for text in (path, tmp_path / "in", f"train={path}"):
        with pytest.raises(UserError, match="--test-fraction"):
            build(f"webdataset:{text}", tmp_path / "no")
    manifest = build(f"webdataset:{path}", tmp_path / "data", Options(test_fraction=0.2, val_fraction=0.2)).manifest
    assert sum(split.samples for split in manifest.splits.values()) == 30
    assert manifest.name == "set-0"
    assert everything(tmp_path / "data") == stock([path])


def test_any_number_of_workers_gives_the_same_index(source, tmp_path):
    for workers in (1, 3):
        build(source, tmp_path / f"{workers}", Options(val_fraction=0.2, workers=workers))
    one, three = (sorted((tmp_path / w).rglob("*.npy")) for w in ("1", "3"))
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in three]
    assert Manifest.load(tmp_path / "1") == Manifest.load(tmp_path / "3")


def cut_short(path, key):
    """Damage the image of that key where it lies."""
    with tarfile.open(path) as archive:
        member = archive.getmember(f"{key}.jpg")
    with path.open("r+b") as stream:
        stream.seek(member.offset_data + 30)
        stream.write(bytes(member.size - 30))


def test_only_tars_with_skipped_samples_are_written_anew_and_stock_webdataset_reads_all(source, tmp_path):
    cut_short(tmp_path / "in/train-1.tar", "00105")
    tar(tmp_path / "in/test-0.tar", {k: v for k, v in samples(1000, 12).items() if k != "01003.cls"})
    data, lines = tmp_path / "data", list[str]()
    for lone in (Options(workers=1), Options(workers=1, on_error="stop")):
        with pytest.raises(UserError, match="key 01003 has no label"):
            build(source, data, lone)
    options = Options(val_fraction=0.2, workers=1, on_error="skip")
    built = build(source, data, options, log=lines.append)
    assert built.skipped == 2
    assert (
        built.manifest.left_out["unreadable images"] == built.manifest.left_out["samples without image or label"] == 1
    )
    assert sum(line.startswith("skipped ") for line in lines) == 2
    links = {p.relative_to(data).as_posix(): p.is_symlink() for p in data.rglob("*.tar")}
    assert links == {
        f"{s}/00000{n}.tar": n in (0, 2)
        for s, n in (("train", 0), ("train", 1), ("train", 2), ("val", 0), ("val", 1), ("val", 2), ("test", 3))
    }
    whole = everything(data)
    assert len(whole) == 89 + 11
    anew = [p for p in data.rglob("*.tar") if not p.is_symlink()]
    assert sorted(stock([*anew, *(tmp_path / "in" / f"train-{n}.tar" for n in (0, 2))])) == whole
    verify(data, deep=True, log=silent)
    assert build(source, data, options).reused


def test_labels_that_begin_at_one_are_named_and_renumbered(tmp_path):
    files = {f"{i:03d}.{e}": c for i in range(30) for e, c in (("jpg", image(i)), ("cls", str(1 + i % 3).encode()))}
    one = tar(tmp_path / "in/one.tar", files)
    two = tar(tmp_path / "in/two.tar", {f"t{k}": v for k, v in files.items()})
    for text in (f"{one}", f"train={one},test={two}"):
        with pytest.raises(UserError, match="labels begin at 1, not at 0; give --first-label 1"):
            build(f"webdataset:{text}", tmp_path / "no", Options(test_fraction=None if "=" in text else 0.2))
    options = Options(workers=1, val_fraction=0.2, first_label=1)
    manifest = build(f"webdataset:train={one},test={two}", tmp_path / "d", options).manifest
    assert manifest.classes == ("1", "2", "3")
    shards = sorted((tmp_path / "d").rglob("*.tar"))
    assert not any(p.is_symlink() for p in shards)
    assert everything(tmp_path / "d") == stock(shards) == sorted((p, label - 1) for p, label in stock([one, two]))
    with pytest.raises(UserError, match="has the label 1, less than --first-label 2"):
        build(f"webdataset:train={one},test={two}", tmp_path / "no", Options(first_label=2))
    with pytest.raises(UserError, match="--first-label works only with webdataset: sources"):
        build("digits", tmp_path / "no", Options(first_label=1))


def test_one_class_alone_is_refused_before_anything_is_read(tmp_path):
    path = tar(tmp_path / "one.tar", samples(0, 12, classes=1))
    with pytest.raises(UserError, match="one holds only the class 0; give one of two or more"):
        build(f"webdataset:{path}", tmp_path / "no", Options(test_fraction=0.2))
    assert not (tmp_path / "no").exists()


def test_files_of_samples_that_are_not_read_are_counted(tmp_path):
    path = tar(tmp_path / "in/x.tar", samples(0, 12) | {"00011.txt": b"x", "00011.json": b"{}", "README": b"x"})
    (tmp_path / "in/more.tar.gz").touch()
    (tmp_path / "in/._x.tar").write_bytes(b"\0\5\x16\7 what macOS leaves beside a file on other disks")
    (tmp_path / "in/sub").mkdir()
    more = {f"{kind} beside the tars": 1 for kind in (".gz files", "directories", "hidden files")}
    for text, beside in ((path, {}), (path.parent, more)):
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        manifest = build(f"webdataset:{text}", tmp_path / "d", Options(test_fraction=0.2)).manifest
        assert manifest.left_out == {".txt files": 1, ".json files": 1, "files without a key": 1} | beside


def test_names_with_a_colon_lists_and_a_tilde_are_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    tar(tmp_path / "a:b/x-0.tar", samples(0, 12))
    tar(tmp_path / "y::z.tar", samples(100, 12))
    tar(tmp_path / "home/in/t-1.tar", samples(200, 12))
    options = Options(workers=1, test_fraction=0.2)
    for number, (text, images) in enumerate(
        [("a:b/x-0.tar", 12), ("a:b/x-*.tar", 12), ("a:b/x-{0..0}.tar", 12), ("a:b", 12), ("y::z.tar", 12)]
        + [("a:b/x-0.tar::~/in", 24), ("~/in::./y::z.tar", 0), ("a:b/x-{0..0}.tar::~/in/t-*.tar", 24)]
    ):
        if not images:  # a name with :: in a list is two names
            with pytest.raises(UserError, match="y does not exist"):
                build(f"webdataset:{text}", tmp_path / f"d{number}", options)
            continue
        manifest = build(f"webdataset:{text}", tmp_path / f"d{number}", options).manifest
        assert sum(split.samples for split in manifest.splits.values()) == images
    built = build("webdataset:train=a:b/x-0.tar,test=~/in/t-1.tar", tmp_path / "last", Options(workers=1))
    assert built.manifest.splits["test"].samples == 12
    with pytest.raises(UserError, match=r"s3:x/y\.tar is a URL; download the tars"):
        build("webdataset:a:b::s3:x/y.tar", tmp_path / "no", options)
    with pytest.raises(UserError, match="is a command, and commands are never run"):
        build("webdataset:a:b::pipe:true", tmp_path / "no", options)


@pytest.mark.parametrize("document", [{"label": 0}, {"label": "0"}])
def test_labels_in_json_are_numbers(tmp_path, document):
    path = labelled(tmp_path / "x.tar", document)
    assert [s.label for s in listed(path, 0, TarSet([path]))] == [0]


@pytest.mark.parametrize("document", [{"label": "cat"}, {"label": 1.0}, {"label": True}, {"label": None}, {}, [1]])
def test_other_labels_in_json_are_an_error_with_the_key(tmp_path, document):
    path = labelled(tmp_path / "x.tar", document)
    with pytest.raises(UserError, match=r"x\.tar: key a has (no label|the label)"):
        list(listed(path, 0, TarSet([path])))


def test_a_class_of_test_that_train_lacks_is_an_error(source, tmp_path):
    tar(tmp_path / "in/test-0.tar", {"a.jpg": image(0), "a.cls": b"3"})
    with pytest.raises(UserError, match=r"test-0\.tar: a\.jpg has the label 3, which no image of train has"):
        build(source, tmp_path / "data")


def test_compressed_and_empty_tars_are_an_error(tmp_path):
    path = tar(tmp_path / "a.tar", samples(0, 3))
    packed = tmp_path / "b.tar"
    with tarfile.open(packed, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("x"), io.BytesIO())
    (tmp_path / "c.tar").touch()
    for name, message in [("b.tar", "is compressed .gzip."), ("c.tar", "it is empty")]:
        with pytest.raises(UserError, match=message):
            build(f"webdataset:{tmp_path / name}", tmp_path / "data", Options(test_fraction=0.2))
    shutil.copy(path, tmp_path / "d.tar")
    with pytest.raises(UserError, match="given twice|named twice"):
        build(f"webdataset:train={path},test={path}", tmp_path / "data")
