"""python -m gdd_dist.status: what is there, running or done; and pruning that takes nothing anybody needs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import stores
from conftest import Finished

from gdd_dist import status
from gdd_dist.config.steps import TABLE
from gdd_dist.pipeline.store_users import FILE, note_user, users
from gdd_dist.runtime.locks import Lock
from gdd_dist.storage.checkpoints import Checkpoints
from gdd_dist.storage.json_files import write_json
from gdd_dist.storage.store import Store, link_latest
from sharding.errors import UserError

OLD = "0123456789abcdef"
STEPS = ("teachers", "logits", "gaussian", "gan", "matching", "report")


@pytest.fixture
def out(reported: Finished, tmp_path: Path) -> Path:
    """A finished run of its own."""
    copy = Path(shutil.copytree(reported.out, tmp_path / "out", symlinks=True))
    (copy / FILE).unlink()
    note_user(copy, copy)
    return copy


@pytest.fixture
def shared(reported: Finished, tmp_path: Path) -> tuple[Path, Path, Path]:
    """(store, OUT a, OUT b): two runs of the same settings on one store."""
    store = Path(shutil.copytree(reported.out, tmp_path / "store", symlinks=True))
    (store / FILE).unlink()
    outs = [tmp_path / "a", tmp_path / "b"]
    for one in outs:
        one.mkdir()
        text = (reported.out / "config.yaml").read_text()
        (one / "config.yaml").write_text(text.replace("store: null", f"store: {store}"))
        for step in STEPS:
            link_latest(one, step, (reported.out / step / "latest").resolve())
            link_latest(one, step, store / step / (reported.out / step / "latest").resolve().name)
        note_user(store, one)
    return store, outs[0], outs[1]


def old_step(store: Path, step: str = "matching", name: str = OLD) -> Path:
    """What a run with other settings left."""
    directory = store / step / name
    directory.mkdir(parents=True)
    (directory / "generator.safetensors").write_bytes(b"x" * 5000)
    if not name.endswith(".partial"):
        write_json(directory / "contents.json", {"provenance": {"fingerprints": {}}, "files": {}})
    return directory


def said(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    status.main([str(a) for a in argv])
    return capsys.readouterr().out


def line(text: str, step: str) -> str:
    return next(row for row in text.splitlines() if row.startswith(step))


def test_a_run_notes_itself_once_in_its_store(reported: Finished) -> None:
    assert users(reported.out)[0] == str(reported.out.resolve())  # other tests' runs may use its store too
    before = (reported.out / FILE).read_text()
    note_user(reported.out, reported.out)
    assert (reported.out / FILE).read_text() == before


def test_a_finished_run_shows_every_step_and_its_headline(
    out: Path, reported: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(capsys, out)
    assert text.startswith(f"{out}: not running\n")
    assert "digits" in text.splitlines()[1]
    for step in STEPS:
        assert "done" in line(text, step)
        assert reported.steps[step]["fingerprint"] in line(text, step)
    assert "on the test set" in text
    assert "prune" not in text


def test_nothing_of_a_finished_run_is_pruned(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(out.rglob("*"))
    assert "nothing to prune" in said(capsys, out, "--prune", "--yes")
    assert sorted(out.rglob("*")) == before


def test_prune_lists_and_removes_only_when_told(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, half = old_step(out), old_step(out, "gan", f"{OLD}.partial")
    text = said(capsys, out, "--prune")
    assert str(old) in text
    assert str(half) in text
    assert "2 directories" in text
    assert "--prune --yes removes them" in text
    assert old.exists()
    assert half.exists()
    assert "removed 2 of 2" in said(capsys, out, "--prune", "--yes")
    assert not old.exists()
    assert not half.exists()
    assert not list(out.rglob("*.removed")) + list(out.rglob("*.lock"))
    assert "nothing to prune" in said(capsys, out, "--prune")


def test_what_another_listed_run_shows_or_was_made_from_is_kept(
    shared: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    store, a, b = shared
    theirs, root = old_step(store), old_step(store, "teachers")
    write_json(theirs / "contents.json", {"provenance": {"fingerprints": {"teachers": OLD}}, "files": {}})
    link_latest(b, "matching", theirs)
    assert "nothing to prune" in said(capsys, a, "--prune", "--yes")
    assert theirs.exists()
    assert root.exists()
    shutil.rmtree(b)
    text = said(capsys, a, "--prune", "--yes")
    assert f"{b} is listed in {store / FILE} but is no longer a run" in text
    assert "removed 2 of 2" in text
    assert not theirs.exists()
    assert Store(store).finished("matching", (a / "matching" / "latest").resolve().name)


def test_what_a_live_lock_is_writing_is_kept(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = old_step(out, "gan", f"{OLD}.partial")
    lock = Lock(out / "gan" / f"{OLD}.lock")
    assert lock.try_acquire() is None
    assert "nothing to prune" in said(capsys, out, "--prune", "--yes")
    assert half.exists()
    lock.release()
    assert "removed 1 of 1" in said(capsys, out, "--prune", "--yes")


def test_what_comes_into_use_after_the_list_is_kept(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = old_step(out)
    inner = status.remove

    def late(store: Path, run: Path, directory: object) -> bool:
        link_latest(out, "matching", old)
        return inner(store, run, directory)  # type: ignore[arg-type]

    monkeypatch.setattr(status, "remove", late)
    text = said(capsys, out, "--prune", "--yes")
    assert f"{old} is in use now and is kept" in text
    assert old.exists()


def test_an_interrupted_step_says_how_far_it_is_and_is_kept(
    out: Path, reported: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    fp = reported.steps["gan"]["fingerprint"]
    (out / "gan" / fp).rename(out / "gan" / f"{fp}.partial")
    points = out / "gan" / f"{fp}.partial" / "checkpoints"
    points.mkdir()
    Checkpoints(points, 0).save(1234, {})
    text = said(capsys, out, "--prune", "--yes")
    assert "interrupted, checkpoint at step 1,234" in line(text, "gan")
    assert "nothing to prune" in text
    lock = Lock(out / "gan" / f"{fp}.lock")
    assert lock.try_acquire() is None
    assert "running, checkpoint at step 1,234" in line(said(capsys, out), "gan")
    lock.release()
    shutil.rmtree(out / "gan" / f"{fp}.partial")
    assert "to do" in line(said(capsys, out), "gan")


def test_a_live_run_is_named(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = Lock(out / "run.lock")
    assert lock.try_acquire() is None
    assert f"{out}: running, process " in said(capsys, out)
    lock.release()


def test_without_its_data_a_runs_unfinished_steps_are_kept(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = out / "config.yaml"
    text = config.read_text()
    where = next(row for row in text.splitlines() if row.startswith("data:"))
    config.write_text(text.replace(where, "data: /not/there"))
    half, old = old_step(out, "gan", f"{OLD}.partial"), old_step(out)
    text = said(capsys, out, "--prune", "--yes")
    assert "its data set is missing" in text
    assert half.exists()
    assert not old.exists()


def test_of_remote_data_only_the_manifest_is_fetched(
    out: Path, reported: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    config = out / "config.yaml"
    text = config.read_text()
    where = next(row for row in text.splitlines() if row.startswith("data:"))
    server = stores.Web()
    url = server.upload(Path(where.removeprefix("data: ")), "digits")
    config.write_text(text.replace(where, f"data: {url}"))
    assert f"data: {url} (digits" in said(capsys, out)
    assert {path.rpartition("/")[2] for path, _ in server.log} == {"manifest.json"}
    assert not (tmp_path / "home").exists()
    server.close()


def test_wrong_use_is_one_line(out: Path, tmp_path: Path, shared: tuple[Path, Path, Path]) -> None:
    store, a, _ = shared
    (store / FILE).unlink()
    for argv, words in (
        ([str(tmp_path)], "is not a run"),
        ([str(out), "--yes"], "--yes needs --prune"),
        ([str(a), "--prune"], f"{store / FILE} is missing"),
    ):
        with pytest.raises(UserError, match=words):
            status.main(argv)


def test_a_run_of_an_earlier_version_says_which_steps_are_stale_and_why(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TABLE, "gan", replace(TABLE["gan"], version=TABLE["gan"].version + 1))
    lines = {line.split()[0]: line for line in said(capsys, str(out)).splitlines() if line}
    assert "done" in lines["teachers"]
    assert "stale: this version computes it differently" in lines["gan"]
    assert "stale: depends on gan " in lines["matching"]
    assert "stale: depends on gan, matching" in lines["report"]


@pytest.mark.parametrize("text", ["{}", "[]", '{"a', '{"steps": {"gan": 3}, "results": [3]}'])
def test_a_damaged_record_is_a_line_of_the_overview_and_nobody_is_told_to_remove_a_run(
    out: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    latest = (out / "report" / "latest").resolve()
    for path in (out / "steps.json", latest / "metrics.json"):
        path.write_text(text)
    found = said(capsys, out)
    assert f"{out}/steps.json is damaged" in found
    assert "; remove this file and run the same command again" in found
    assert f"{out}/report/latest/metrics.json is damaged" in found
    assert f"; remove {latest} and run gdd_dist.train again" in found
    for step in STEPS:
        assert "done" in line(found, step)


def test_what_a_damaged_step_was_made_from_is_unknown_so_nothing_is_pruned(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = old_step(out)
    contents = (out / "gan" / "latest").resolve() / "contents.json"
    for text in ("{}", "[]", '{"provenance": 3}'):
        contents.write_text(text)
        with pytest.raises(UserError, match=f"{contents} is damaged .*; remove {contents.parent} and run"):
            said(capsys, out, "--prune", "--yes")
    assert old.exists()
