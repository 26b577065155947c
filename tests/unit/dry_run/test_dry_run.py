"""--dry-run against the run that follows: what is run and reused, images, bytes, memory."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gdd_dist import train
from gdd_dist.config.steps import TABLE
from gdd_dist.dry_run import table
from gdd_dist.dry_run.estimates import ESTIMATES, makespan
from gdd_dist.dry_run.table import Line
from gdd_dist.pipeline import images_expected, run
from gdd_dist.pipeline.images_expected import EXPECTED
from gdd_dist.runtime.memory import file_pages, peak_memory, reset_peak, tensors_of
from gdd_dist.runtime.meter import CPU_BLUR, Cost, Curve, Meter
from gdd_dist.runtime.world import World
from gdd_dist.storage.checkpoints import Checkpoints
from gdd_dist.storage.json_files import read_json
from gdd_dist.storage.store import Store

STATUS = {"run": "computed", "reused": "reused", "resumes": "resumed"}
CPU = torch.device("cpu")


def predicted(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Line]:
    """The table that --dry-run prints, step → line."""
    lines: list[Line] = []
    monkeypatch.setattr(table, "table", lambda found: lines.extend(found) or "")
    train.main([*argv, "--dry-run"], lambda world: None)
    return {line.step: line for line in lines}


def happened(
    argv: list[str], out: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict, dict[str, int], dict[str, int]]:
    """steps.json, and what each step wrote and took (resident memory at its peak), in bytes."""
    memory, inner = {}, run.run_step

    def run_step(ctx, step, fps):
        reset_peak(ctx.device)
        record = inner(ctx, step, fps)
        memory[step] = peak_memory(ctx.device) + file_pages(ctx.device)
        return record

    monkeypatch.setattr(run, "run_step", run_step)
    train.main(argv, lambda world: None)
    steps = read_json(out / "steps.json")["steps"]
    written = {
        step: sum(f.stat().st_size for f in (out / step / record["fingerprint"]).rglob("*") if f.is_file())
        for step, record in steps.items()
        if step != "shards"
    }
    return steps, written, memory


def files(directory: Path) -> set[Path]:
    return set(directory.rglob("*")) if directory.exists() else set()


def assert_it_does_what_was_said(argv: list[str], out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run does what --dry-run said, which itself did nothing."""
    before = files(out)
    said = predicted(argv, monkeypatch)
    assert files(out) == before
    steps, written, memory = happened(argv, out, monkeypatch)
    assert {step: STATUS[line.status] for step, line in said.items()} == {s: r["status"] for s, r in steps.items()}
    assert {step: line.images for step, line in said.items()} == {s: r["images_processed"] for s, r in steps.items()}
    for step, line in said.items():
        if line.status == "reused":
            assert (line.steps, line.bytes, line.memory, line.seconds) == (0, 0, 0, 0)
        else:
            assert line.bytes == pytest.approx(written[step], rel=0.1), step
            assert line.memory == pytest.approx(memory[step], rel=0.25), step


def test_what_it_says_is_what_the_run_does(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    argv = [
        *tiny,
        "--out",
        str(out),
        "--gan.grid_interval",
        "5",
        "--matching.select",
        "last",
    ]  # or the Gaussian may be kept
    assert_it_does_what_was_said([*argv, "--until", "gan"], out, monkeypatch)
    assert_it_does_what_was_said([*argv, "--accumulate", "2"], out, monkeypatch)  # matching then draws twice


@pytest.mark.parametrize("start", ["gan", "gaussian"])
def test_candidates_and_moved_gaussians_are_counted(
    start: str, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [*tiny, "--out", str(tmp_path / "out"), "--gaussian.components", "8"]
    argv += ["--matching.start", start, "--matching.lambda_feature", "1" if start == "gaussian" else "0"]
    argv += ["--gaussian.spread", "1.0", "--report.select", "1", "2", "--report.condense", "3", "--report.ars", "false"]
    argv += ["--matching.select", "last"]  # if it kept another's generator, there would be fewer students
    said, expected = predicted(argv, monkeypatch), list[dict[str, int]]()
    inner = run.images_expected
    monkeypatch.setattr(run, "images_expected", lambda *given: expected.append(inner(*given)) or expected[-1])
    steps, _, _ = happened(argv, tmp_path / "out", monkeypatch)
    images = {s: r["images_processed"] for s, r in steps.items()}
    assert {step: line.images for step, line in said.items()} == images
    assert expected == [
        pytest.approx({step: images[step] for step in TABLE}, rel=0.2)
    ]  # what a run guesses its time by


def test_every_step_is_estimated() -> None:
    assert list(ESTIMATES) == list(TABLE)
    assert EXPECTED.keys() <= TABLE.keys()


def test_a_step_without_a_count_of_images_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(images_expected, "EXPECTED", {"gan": lambda ctx, fps: 5})
    ctx = SimpleNamespace(world=World("cpu"), store=Store(tmp_path))
    assert images_expected.images_expected(ctx, dict.fromkeys(TABLE, "0" * 16), list(TABLE)) == {"gan": 5}


@pytest.mark.parametrize(("step", "state"), [("teachers", "net"), ("gan", "g"), ("matching", "nets")])
def test_a_killed_step_counts_what_is_left(
    step: str, state: str, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    argv = [*tiny, "--out", str(out), "--until", step, "--checkpoint_seconds", "0"]
    save = Checkpoints.save

    def save_and_die(self: Checkpoints, done: int, saved: dict[str, object]) -> None:
        save(self, done, saved)
        if state in saved and done == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train.main(argv, lambda world: None)
    left = predicted(argv, monkeypatch)[step]
    assert left.status == "resumes"
    assert left.steps == {"teachers": 36 - 7, "gan": 5, "matching": 5}[step]
    train.main(argv, lambda world: None)
    record = read_json(out / "steps.json")["steps"][step]
    assert (record["status"], record["images_processed"]) == ("resumed", left.images)


def test_without_data_the_digits_are_built_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    argv = ["--out", str(out), "--until", "shards"]
    assert predicted(argv, monkeypatch)["shards"].status == "run"
    assert not out.exists()
    train.main(argv, lambda world: None)
    assert predicted(argv, monkeypatch)["shards"].status == "reused"


def test_the_last_line_says_what_a_gpu_needs(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main([*tiny, "--out", str(tmp_path / "out"), "--until", "teachers", "--dry-run"], lambda world: None)
    text = capsys.readouterr().out
    assert text.startswith("step ")
    assert "GPU memory" in text.splitlines()[-1]


@pytest.mark.parametrize(("second", "unit", "tried"), [(1e-6, 2, 256), (0.1, 6, 6), (10.0, 2, 4)])
def test_slow_batches_are_continued_along_a_line(
    second: float, unit: int, tried: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    meter = Meter(World("cpu"))
    monkeypatch.setattr(meter, "_measure", lambda size, last: Cost(0.5 + second * size, 5.0, size * 2**20))
    cost = meter(lambda n: batches.append(n) or n, 256, unit).at(256)
    assert cost.seconds == pytest.approx(0.5 + second * 256)
    assert cost.tensors == pytest.approx(256 * 2**20)
    assert cost.memory == pytest.approx(5 + CPU_BLUR * (256 - batches[-1]) * 2**20)
    assert batches[-1] >= tried
    assert all(b % unit == 0 for b in batches[:-1])
    assert meter.extrapolated == (batches[-1] < 256)


def test_costs_between_and_beyond_what_was_measured() -> None:
    curve = Curve([(2, Cost(1.0, 50.0, 7.0)), (4, Cost(2.0, 40.0, 8.0, 90.0))], blur=3.0)
    assert curve.at(1) == curve.at(2) == Cost(1.0, 50.0, 7.0)
    assert curve.at(3) == Cost(1.5, 45.0, 7.5, 90.0)
    assert curve.at(4) == Cost(2.0, 40.0, 8.0, 90.0)
    assert curve.at(10) == Cost(5.0, 49.0, 11.0, 90.0)
    assert Curve([(7, Cost(2.0, 50.0))]).at(9) == Cost(2.0, 50.0)
    noisy = Curve([(2, Cost(1.0, 50.0, 7.0)), (4, Cost(0.5, 40.0, 6.0))])
    assert noisy.at(12) == Cost(1.0, 40.0, 6.0)


def test_tensors_are_followed_to_their_end() -> None:
    kept = torch.zeros(1000)

    def step() -> None:
        a = kept + 1  # 4,000 bytes
        b = a * a  # 8,000
        del a
        b.add_(1).view(10, 100)  # no more
        c = b + 1  # 8,000
        del b, c
        kept.mul_(2)

    assert tensors_of(step) == 8000


def test_memory_that_was_given_back_leaves_the_peak() -> None:
    reset_peak(CPU)
    before = peak_memory(CPU)
    block = torch.ones(30_000_000)
    assert peak_memory(CPU) - before == pytest.approx(120e6, rel=0.1)
    del block
    if os.path.exists("/proc/self/clear_refs"):
        reset_peak(CPU)
        assert peak_memory(CPU) - before < 60e6


def test_the_longest_jobs_start_first() -> None:
    assert makespan([1, 1, 1, 3], 2) == 3
    assert makespan([2, 2, 2], 2) == 4
    assert makespan([], 3) == 0
