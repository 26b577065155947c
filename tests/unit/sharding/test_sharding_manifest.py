import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.errors import UserError
from sharding.manifest import FILE, Manifest, ShardInfo, SplitInfo


def example() -> Manifest:
    shards = tuple(ShardInfo(f"train/{i:06d}.tar", 2, 10240, f"{i}" * 64, "a" * 64) for i in range(2))
    test = SplitInfo(1, (0, 1), (ShardInfo("test/000000.tar", 1, 10240, "b" * 64, "c" * 64),))
    splits = {"train": SplitInfo(4, (1, 3), shards), "test": test}
    return Manifest("m", ("x", "y"), 8, 6, 3, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), {"numpy": "2"}, splits)


def test_a_manifest_survives_the_disk(tmp_path):
    example().save(tmp_path)
    assert Manifest.load(tmp_path) == example()
    assert json.loads((tmp_path / FILE).read_text())["classes"] == [{"id": 0, "name": "x"}, {"id": 1, "name": "y"}]


@given(
    st.lists(st.floats(0, 1), min_size=6, max_size=6), st.text(min_size=1), st.lists(st.text(), min_size=2, max_size=2)
)
def test_any_numbers_and_names_survive_json(values, name, classes):
    manifest = dataclasses.replace(
        example(), name=name, classes=tuple(classes), mean=tuple(values[:3]), std=tuple(values[3:])
    )
    again = Manifest.from_json(json.loads(json.dumps(manifest.to_json())))
    assert again == manifest
    assert again.fingerprint == manifest.fingerprint


def test_the_fingerprint_is_pinned_and_ignores_versions():
    assert dataclasses.replace(example(), versions={}).fingerprint == example().fingerprint
    assert example().fingerprint == "412251bcf39ce2d9"


@pytest.mark.parametrize(
    "change",
    [
        {"name": "n"},
        {"classes": ("x", "z")},
        {"height": 6},
        {"mean": (0.1, 0.2, 0.30001)},
        {"std": (0.4, 0.5, 0.7)},
        {"splits": {"train": example().splits["train"]}},
    ],
)
def test_the_fingerprint_changes_with_all_else(change):
    assert dataclasses.replace(example(), **change).fingerprint != example().fingerprint


def damaged(path: list[object], value: object) -> str:
    document = example().to_json()
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "null",
        '{"format": "gdd-shards/1"}',
        damaged(["format"], "other"),
        damaged(["name"], ""),
        damaged(["classes"], []),
        damaged(["classes"], [{"id": 1, "name": "x"}, {"id": 0, "name": "y"}]),
        damaged(["image", "height"], 0),
        damaged(["image", "channels"], 4),
        damaged(["mean"], [0.1]),
        damaged(["splits"], []),
        damaged(["splits"], {}),
        damaged(["splits", "train", "samples"], 5),
        damaged(["splits", "train", "class_counts"], [4]),
        damaged(["splits", "train", "shards"], []),
        damaged(["splits", "train", "shards", 0, "samples"], 3),
        damaged(["splits", "train", "shards", 0, "file"], "../train/000000.tar"),
        damaged(["splits", "train", "shards", 0, "file"], "test/000000.tar"),
        damaged(["splits", "train", "shards", 0, "sha256"], "0"),
        damaged(["splits", "train", "shards", 0, "bytes"], "10240"),
    ],
)
def test_a_manifest_that_is_none_or_contradicts_itself_is_refused(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError, match="manifest.json is not a dataset manifest"):
        Manifest.load(tmp_path)


def test_a_directory_without_a_manifest_is_no_data_set(tmp_path):
    with pytest.raises(UserError, match="no dataset in .*manifest.json is missing.*build one"):
        Manifest.load(tmp_path / "nowhere")
    (tmp_path / "build.json").write_text("{}")
    with pytest.raises(UserError, match="not finished; run the same build command again"):
        Manifest.load(tmp_path)
