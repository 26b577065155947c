"""What a user sees while they wait: how far, how fast, how long yet; a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import Finished

from gdd_dist import export
from gdd_dist.runtime import monitor
from gdd_dist.runtime.monitor import Monitor
from sharding import progress
from sharding.options import Options
from sharding.progress import Progress
from sharding.verify import verify
from sharding.writer import build

LINE = re.compile(r"^(.+): [\d,]+ of [\d,]+ (\w+), [\d,.]+ \2/s, [\d.]+ (?:s|min|h|days) left(?:, .+)?$", re.MULTILINE)
"""What is being done, how far, how fast, how long yet."""


def shown(text: str) -> set[str]:
    """What progress was shown of."""
    return {what for what, _ in LINE.findall(text)}


def test_every_long_loop_of_a_run_says_how_fast_it_is_and_what_is_left(reported: Finished) -> None:
    steps = {"verify", "teachers", "logits", "gaussian", "gan", "matching", "matching: quick students", "report"}
    assert shown(reported.err) >= steps | {"report: convnet:8 on full"}
    # So little of these that their first look is their last.
    for what in ("report: convnet:8 on real", "report: nearest neighbours", "train: decoding"):
        assert re.search(rf"^{what}: ([\d,]+) of \1|^{what}: 1,024 of", reported.err, re.MULTILINE), what
    assert "oddly" not in reported.err, "TensorBoard warns of what was logged"


def test_building_and_verifying_shards_says_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "INTERVAL_S", -1.0)
    said: list[str] = []
    build("digits", tmp_path / "d", Options(shard_size=400_000, workers=1), log=said.append)
    verify(tmp_path / "d", deep=True, log=said.append)
    assert shown("\n".join(said)) == {"reading", "writing", "hashing", "verifying"}


def test_an_export_says_it_too(
    reported: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(monitor, "LINE_SECONDS", -1.0)
    monkeypatch.setattr(export, "CHUNK", 100)
    export.main([str(reported.out), str(tmp_path / "set"), "--total", "300", "--device", "cpu"])
    assert shown(capsys.readouterr().err) == {"export"}


class Terminal(io.StringIO):
    """A stderr that is one."""

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_a_bar_shows_rate_and_time_left_and_that_of_a_part_goes_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    for passing in (False, True):
        watched = Monitor(None, "gan", 10, passing=passing)
        watched.advance(5, "a note")
        watched._bar.refresh()  # type: ignore[union-attr]
        watched.close()
        text = sys.stderr.getvalue()  # type: ignore[attr-defined]
        assert re.search(r"gan:  50%\|.*\| 5/10 \[00:\d\d<00:\d\d, .*step/s, a note\]", text)
        assert text.rpartition("\r")[2].strip() == ("" if passing else text.rpartition("\r")[2].strip())
    with Progress("reading", 10, log=print, bar=True) as counted:
        counted.update(5)
    assert re.search(r"reading:.* images/s", sys.stderr.getvalue())  # type: ignore[attr-defined]


def test_what_an_earlier_run_did_does_not_count_in_the_rate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(monitor, "time", SimpleNamespace(monotonic=lambda: now[0]))
    watched = Monitor(None, "teachers", 1000)
    for second, call, done in ((0, watched.advance, 10), (10, watched.already, 900), (20, watched.advance, 910)):
        now[0] = second
        call(done)
    now[0] = 800
    watched.advance(920)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "teachers: 910 of 1,000 steps, 1.0 steps/s, 90.0 s left"
    assert second == "teachers: 920 of 1,000 steps, 0.037 steps/s, 36 min left"


def test_the_end_of_a_step_is_one_line_that_of_a_part_none(capsys: pytest.CaptureFixture[str]) -> None:
    for passing in (False, True):
        watched = Monitor(None, "logits", 3, unit="image", passing=passing)
        for done in (1, 2, 3, 3):
            watched.advance(done)
    assert re.fullmatch(r"logits: 3 of 3 images, [\d.]+ images/s\n", capsys.readouterr().err)
