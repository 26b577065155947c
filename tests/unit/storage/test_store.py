"""A step's directory is whole or not there."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdd_dist.storage import store as store_module
from gdd_dist.storage.json_files import fingerprint, read_json, write_json
from gdd_dist.storage.store import (
    Store,
    Whole,
    files_of,
    link_latest,
    made_from,
    read_records,
    verify_file,
    write_records,
)
from sharding.errors import UserError
from sharding.files import sha256_file

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values, max_size=5))
def test_a_fingerprint_does_not_depend_on_the_order_of_keys(parts):
    assert fingerprint(parts) == fingerprint(dict(reversed(parts.items())))


@given(st.dictionaries(st.text(), json_values, max_size=5), st.text(), json_values)
def test_a_fingerprint_tells_different_parts_apart(parts, key, value):
    other = {**parts, key: value}
    same = json.dumps(other, sort_keys=True) == json.dumps(parts, sort_keys=True)
    assert (fingerprint(other) == fingerprint(parts)) == same


def test_fingerprint_golden_value():
    assert fingerprint({"b": [1, 2.5, None], "a": "ü"}) == "703dceec79c30480"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_a_fingerprint_of_what_json_cannot_hold_is_refused(value):
    with pytest.raises((ValueError, TypeError)):
        fingerprint({"x": value})


def test_json_is_written_whole_and_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": [1, "ä"]})
    assert read_json(path) == {"x": [1, "ä"]}
    path.write_text('{"x": [1,')
    for damaged in (path, tmp_path / "none.json"):
        with pytest.raises(UserError, match=str(damaged)):
            read_json(damaged)


def test_json_of_another_shape_is_damaged_and_the_remedy_is_the_callers(tmp_path):
    (tmp_path / "step").mkdir()
    (tmp_path / "latest").symlink_to("step")
    path = tmp_path / "latest" / "a.json"
    for value in ({}, [], [{}], 3, None, "text", {"x": 3}, {"x": {"y": []}}):
        write_json(path, value)
        with pytest.raises(UserError, match=f"{path} is damaged .*; remove {tmp_path}/step and run") as fault:
            read_json(path, lambda found: int(found["x"]["y"]))
        assert "latest and" not in str(fault.value)
        with pytest.raises(UserError, match=f"{path} is damaged .*; do this$"):
            read_json(path, lambda found: int(found["x"]["y"]), "do this")
    write_json(path, {"x": {"y": 7}})
    assert read_json(path, lambda found: int(found["x"]["y"])) == 7


@pytest.mark.parametrize("text", ["{}", "[]", '{"a', "3", '{"steps": []}', '{"steps": {"gan": {"status": "reused"}}}'])
def test_a_damaged_record_of_a_run_costs_no_more_than_itself(tmp_path, text):
    assert read_records(tmp_path) == {}
    (tmp_path / "steps.json").write_text(text)
    with pytest.raises(UserError, match=f"{tmp_path}/steps.json is damaged .*; remove this file and run"):
        read_records(tmp_path)
    record = {"fingerprint": "f" * 16, "status": "computed", "seconds": 1.5, "images_processed": 3}
    write_records(tmp_path, {"gan": record})
    assert read_records(tmp_path) == {"gan": record}


@pytest.mark.parametrize(
    "contents",
    [{}, [], {"provenance": []}, {"provenance": {"fingerprints": {}}, "files": []}, {"files": {"a": {"bytes": 3}}}],
)
def test_contents_of_another_shape_name_the_directory_to_remove(store, contents):
    directory = store.path("gan", "f" * 16)
    directory.mkdir(parents=True)
    named = {"step": "gan", "fingerprint": "f" * 16}
    write_json(directory / "contents.json", {**named, **contents} if isinstance(contents, dict) else contents)
    for read in (
        lambda: store.files("gan", "f" * 16),
        lambda: files_of(directory),
        lambda: made_from(directory, "teachers"),
    ):
        with pytest.raises(UserError, match=f"contents.json is damaged .*; remove {directory} and run"):
            read()


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def fill(store, step="gan", fp="f" * 16):
    work = store.partial(step, fp)
    (work / "checkpoints").mkdir(parents=True)
    (work / "checkpoints" / "step-1.pt").write_bytes(b"c")
    (work / "deep").mkdir()
    (work / "deep" / "a.npy").write_bytes(b"abc")
    (work / "b.json").write_bytes(b"{}")
    (work / ".b.json.77.tmp").write_bytes(b"half")
    return work


def test_a_step_is_not_there_until_it_is_finished(store):
    work = fill(store)
    assert not store.finished("gan", "f" * 16)
    path = store.finish("gan", "f" * 16, {"info": {"n": 1}})
    assert store.finished("gan", "f" * 16)
    assert not work.exists()
    assert sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()) == [
        "b.json",
        "contents.json",
        "deep/a.npy",
    ]
    assert read_json(path / "contents.json")["info"] == {"n": 1}
    for file, size, sha256 in store.files("gan", "f" * 16):
        verify_file(file, size, sha256, "no fault")


def test_a_crash_while_finishing_leaves_it_unfinished(store, monkeypatch):
    fill(store)
    monkeypatch.setattr(store_module.os, "rename", lambda *a: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(OSError, match="gone"):
        store.finish("gan", "f" * 16, {})
    assert not store.finished("gan", "f" * 16)
    assert (store.partial("gan", "f" * 16) / "checkpoints" / "step-1.pt").exists()  # the next start goes on from there
    monkeypatch.undo()
    store.finish("gan", "f" * 16, {})
    assert {str(p) for p, _, _ in store.files("gan", "f" * 16)} == {
        str(store.path("gan", "f" * 16) / name) for name in ("b.json", "deep/a.npy")
    }


def test_contents_of_another_step_are_refused(store):
    fill(store)
    store.finish("gan", "f" * 16, {}).rename(store.path("gan", "0" * 16))
    with pytest.raises(UserError, match="belongs to another step"):
        store.files("gan", "0" * 16)


def test_an_altered_file_is_named_with_what_to_do(tmp_path):
    path = tmp_path / "a.npy"
    path.write_bytes(b"abc")
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    verify_file(path, 3, sha256, "do this")
    for change in (b"abd", b"ab", b"abcd"):
        path.write_bytes(change)
        with pytest.raises(UserError, match=f"{path}.*do this"):
            verify_file(path, 3, sha256, "do this")
    path.unlink()
    with pytest.raises(UserError, match=f"{path} is missing; do this"):
        verify_file(path, 3, sha256, "do this")


def test_latest_is_a_relative_link_that_follows(tmp_path):
    for name in ("one", "two"):
        (tmp_path / "store" / "gan" / name).mkdir(parents=True)
        link_latest(tmp_path / "out", "gan", tmp_path / "store" / "gan" / name)
        link = tmp_path / "out" / "gan" / "latest"
        assert str(link.readlink()) == f"../../store/gan/{name}"
        assert link.resolve() == tmp_path / "store" / "gan" / name
    assert [p.name for p in (tmp_path / "out" / "gan").iterdir()] == ["latest"]


def test_files_that_were_written_whole_are_known_whatever_a_kill_cut_short(tmp_path):
    first, second = Whole(tmp_path, 0), Whole(tmp_path, 1)
    assert first.known() == {}
    first.note(tmp_path / "deep" / "a.npy", b"abc")
    second.note(tmp_path / "b.npy", b"")
    torn = tmp_path / "checkpoints" / "whole-00000.jsonl"
    with torn.open("a") as stream:
        stream.write('\n{"file": "c.npy", "byt')
    first.note(tmp_path / "d.npy", b"d")
    assert set(second.known()) == {"deep/a.npy", "b.npy", "d.npy"}
    noted = (3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    assert second.known()["deep/a.npy"] == {noted}
    second.note(tmp_path / "deep" / "a.npy", b"")  # damaged, and written anew by another rank
    assert second.known()["deep/a.npy"] == {noted, second.known()["b.npy"].pop()}


def test_what_was_hashed_where_it_was_written_is_not_read_again(store, monkeypatch):
    fill(store)
    work = store.partial("gan", "f" * 16)
    noted, twice = Whole(work, 0), Whole(work, 1)
    written = {"deep/a.npy": (work / "deep" / "a.npy").read_bytes(), "b.json": (work / "b.json").read_bytes()}
    for name, data in written.items():
        noted.note(work / name, data)
    twice.note(work / "b.json", b"x" * len(written["b.json"]))  # damaged, and written anew: as it is now counts
    read = []
    monkeypatch.setattr(store_module, "sha256_file", lambda path: read.append(path.name) or sha256_file(path))
    store.finish("gan", "f" * 16, {})
    assert read == ["b.json"]
    assert {(p.name, n, h) for p, n, h in store.files("gan", "f" * 16)} == {
        (name.rpartition("/")[2], len(data), hashlib.sha256(data).hexdigest()) for name, data in written.items()
    }


def test_a_file_that_was_cut_short_after_it_was_written_does_not_finish(store):
    fill(store)
    path = store.partial("gan", "f" * 16) / "deep" / "a.npy"
    Whole(store.partial("gan", "f" * 16), 0).note(path, path.read_bytes() + b"more")
    with pytest.raises(UserError, match=f"{path} is damaged"):
        store.finish("gan", "f" * 16, {})
    assert not store.finished("gan", "f" * 16)
