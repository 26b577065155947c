import io
import json
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image
from test_sharding_support import contents, encoded, pixels, write_folder

from sharding.errors import UserError
from sharding.options import Options
from sharding.shards import Shards, decode
from sharding.writer import build

ONE = Options(workers=1, test_fraction=0.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("source") / "data", {"a": 60, "b": 40, "c": 20})


def test_the_bytes_do_not_depend_on_the_number_of_workers(folder, tmp_path):
    outcomes = []
    for workers in (1, 3):
        options = Options(workers=workers, test_fraction=0.2, shard_size=40_000)
        manifest = build(f"folder:{folder}", tmp_path / str(workers), options).manifest
        outcomes.append(contents(tmp_path / str(workers), without=()))
    assert len(manifest.splits["train"].shards) > 3
    assert outcomes[0] == outcomes[1]


def test_the_seed_changes_splits_and_order_but_not_what_is_in_the_data_set(folder, tmp_path):
    everything = []
    for seed in (0, 1):
        options = Options(workers=1, test_fraction=0.2, seed=seed)
        manifest = build(f"folder:{folder}", tmp_path / str(seed), options).manifest
        everything.append(
            [
                (bytes(shards.payload(i)), int(shards.labels[i]))
                for name in manifest.splits
                for shards in [Shards(tmp_path / str(seed), manifest, name)]
                for i in range(shards.samples)
            ]
        )
    assert everything[0] != everything[1]
    assert sorted(everything[0]) == sorted(everything[1])


def test_every_shard_has_nearly_the_same_class_mix(folder, tmp_path):
    manifest = build(
        f"folder:{folder}", tmp_path / "d", Options(workers=1, test_fraction=0.2, shard_size=20_000)
    ).manifest
    shards = Shards(tmp_path / "d", manifest, "train")
    ends = np.cumsum(shards.shard_samples)
    counts = np.array([np.bincount(part, minlength=3) for part in np.split(shards.labels, ends[:-1])])
    assert len(counts) > 4
    assert np.ptp(counts, axis=0).max() <= 1


def test_mean_and_std_are_those_of_the_decoded_train_images(folder, tmp_path):
    manifest = build(f"folder:{folder}", tmp_path / "d", ONE).manifest
    shards = Shards(tmp_path / "d", manifest, "train")
    images = np.empty((shards.samples, 8, 8, 3), np.uint8)
    for i in range(shards.samples):
        decode(shards.payload(i), images[i])
    flat = (images / 255).reshape(-1, 3)
    np.testing.assert_allclose(manifest.mean, flat.mean(0), rtol=1e-12)
    np.testing.assert_allclose(manifest.std, flat.std(0), rtol=1e-12)
    exact = Fraction(int(images[..., 0].astype(np.int64).sum()), images[..., 0].size * 255)
    assert manifest.mean[0] == float(exact)


def test_stock_webdataset_reads_the_shards(folder, tmp_path):
    import webdataset

    manifest = build(f"folder:{folder}", tmp_path / "d", ONE).manifest
    for name, split in manifest.splits.items():
        urls = [str(tmp_path / "d" / info.file) for info in split.shards]
        samples = list(webdataset.WebDataset(urls, shardshuffle=False))
        shards = Shards(tmp_path / "d", manifest, name)
        assert [sample["png"] for sample in samples] == [bytes(shards.payload(i)) for i in range(shards.samples)]
        assert [int(sample["cls"]) for sample in samples] == shards.labels.tolist()
        assert len({sample["__key__"] for sample in samples}) == split.samples


def test_images_of_every_kind_become_one_kind(tmp_path):
    folder = write_folder(tmp_path / "s", {"a": 4, "b": 4})
    (folder / "a/grey.png").write_bytes(encoded(pixels(1, channels=1)))
    (folder / "a/photo.jpeg").write_bytes(encoded(pixels(2), "JPEG"))
    (folder / "b/wrong suffix.jpg").write_bytes(encoded(pixels(3), "WEBP"))
    (folder / "b/alpha.png").write_bytes(encoded(pixels(4, channels=4)))
    Image.fromarray(pixels(5)).convert("CMYK").save(folder / "b/cmyk.tif")
    manifest = build(f"folder:{folder}", tmp_path / "d", ONE).manifest
    assert (manifest.height, manifest.width, manifest.channels) == (8, 8, 3)
    kept = [(folder / name).read_bytes() for name in ("a/grey.png", "a/photo.jpeg", "b/wrong suffix.jpg")]
    stored = []
    for name in manifest.splits:
        shards = Shards(tmp_path / "d", manifest, name)
        stored += [bytes(shards.payload(i)) for i in range(shards.samples)]
        for i in range(shards.samples):
            decode(shards.payload(i), np.empty((8, 8, 3), np.uint8))
    assert len(stored) == 13
    assert all(payload in stored for payload in kept)
    assert (folder / "b/alpha.png").read_bytes() not in stored


def test_a_set_of_single_channel_images_stays_so(tmp_path):
    folder = write_folder(tmp_path / "s", {"a": 6, "b": 6}, channels=1)
    Image.fromarray(np.full((8, 8), 30000, np.uint16)).save(folder / "a/deep.png")
    manifest = build(f"folder:{folder}", tmp_path / "d", ONE).manifest
    assert manifest.channels == len(manifest.mean) == 1


def test_mixed_sizes_need_an_image_size(tmp_path):
    folder = write_folder(tmp_path / "s", {"a": 6, "b": 6})
    write_folder(folder, {"c": 6}, size=12)
    with pytest.raises(UserError, match=r"images differ in size \(2 sizes: 12 of 8x8, 6 of 12x12.*give --image-size"):
        build(f"folder:{folder}", tmp_path / "d", ONE)
    assert not (tmp_path / "d").exists()
    manifest = build(f"folder:{folder}", tmp_path / "d", Options(workers=1, test_fraction=0.2, image_size=10)).manifest
    assert (manifest.height, manifest.width) == (10, 10)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_unreadable_image_is_named_or_skipped_and_counted(tmp_path, workers):
    folder = write_folder(tmp_path / "s", {"a": 12, "b": 12})
    (folder / "a/0003.png").write_bytes(b"not an image")
    truncated = encoded(pixels(0, 64, 64), "JPEG")
    (folder / "b/photo.jpg").write_bytes(truncated[: len(truncated) // 2])
    stop = Options(workers=workers, test_fraction=0.2, image_size=8)
    with pytest.raises(UserError, match=r"cannot read a/0003\.png \(not an image.*\), and 1 more; .* --on-error skip"):
        build(f"folder:{folder}", tmp_path / "d", stop)
    lines: list[str] = []
    skip = Options(workers=workers, test_fraction=0.2, image_size=8, on_error="skip")
    built = build(f"folder:{folder}", tmp_path / "d", skip, log=lines.append)
    assert built.skipped == 2
    assert sum(split.samples for split in built.manifest.splits.values()) == 23
    assert [line.split(":")[0] for line in lines if "skipped" in line] == ["skipped a/0003.png", "skipped b/photo.jpg"]
    assert len(json.loads((tmp_path / "d/build.json").read_text())["skipped"]) == 2


def test_a_class_whose_images_are_all_skipped_is_named(tmp_path):
    folder = write_folder(tmp_path / "s", {"a": 6, "b": 1})
    (folder / "b/0000.png").write_bytes(b"x")
    with pytest.raises(UserError, match="class b has no image in train"):
        build(f"folder:{folder}", tmp_path / "d", Options(workers=1, test_fraction=0.2, on_error="skip"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "data has no test set; give --test-fraction"),
        ({"val_fraction": -0.1}, "--val-fraction is -0.1"),
        ({"test_fraction": 1.0}, "--test-fraction is 1.0"),
        ({"test_fraction": float("nan")}, "--test-fraction is nan"),
        ({"shard_size": 0}, "--shard-size is 0"),
        ({"workers": 0}, "--workers is 0"),
        ({"image_size": -1}, "--image-size is -1"),
        ({"image_size": 10**6}, "--image-size is 1000000"),
        ({"seed": -1}, "--seed is -1"),
        ({"on_error": "ignore"}, "--on-error is ignore"),
    ],
)
def test_options_that_make_no_sense_are_named(folder, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        build(f"folder:{folder}", tmp_path / "d", Options(**options))
    assert not (tmp_path / "d").exists()


def test_fractions_do_not_suit_a_source_that_brings_its_own_split(tmp_path):
    folder = write_folder(tmp_path / "s", {"train/a": 4, "train/b": 4, "val/a": 1, "test/a": 2})
    for options, name in ((Options(val_fraction=0.1), "val"), (Options(test_fraction=0.1), "test")):
        with pytest.raises(UserError, match=f"already has a {name} set; leave --{name}-fraction out"):
            build(f"folder:{folder}", tmp_path / "d", options)


def test_images_are_stored_without_loss_whatever_their_suffix(tmp_path):
    folder = tmp_path / "s"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for i in range(6):
            stream = io.BytesIO()
            Image.fromarray(pixels(i)).save(stream, "BMP")
            (folder / name / f"{i}.bmp").write_bytes(stream.getvalue())
    manifest = build(f"folder:{folder}", tmp_path / "d", ONE).manifest
    shards = Shards(tmp_path / "d", manifest, "train")
    out = np.empty((8, 8, 3), np.uint8)
    decode(shards.payload(0), out)
    assert any((out == pixels(i)).all() for i in range(6))
