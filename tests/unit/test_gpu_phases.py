"""benchmarks/gpu.py: a phase that hangs, fails or finds nothing is said and the others go on; the last run fits the time that is left."""

import importlib
import json
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu
from gpu_phases import CALLS, PHASES, VARIANTS, bench, run

from gdd_dist.config import command_line


def lines(out):
    return [json.loads(line) for line in (out / gpu.RECORD).open()]


def attempt(out, code, limit=20.0):
    return gpu.attempt(out, "a-phase", limit, [sys.executable, "-c", code])


def test_a_phase_that_hangs_is_killed_with_its_children_and_what_it_found_is_kept(tmp_path):
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(900)'])"
    begin = time.monotonic()
    assert attempt(tmp_path, f"print('{{\"found\": 1}}', flush=True); {child}", limit=2.0) == "late"
    assert time.monotonic() - begin < 600  # the child would sleep longer
    found, status = lines(tmp_path)
    assert found == {"phase": "a-phase", "found": 1}
    assert (status["status"], status["returncode"]) == ("late", -9)


@pytest.mark.parametrize(
    ("code", "status", "kept"),
    [
        ("print('{\"found\": 1}')", "ok", 1),
        ("pass", "failed", 0),
        ("print('{\"found\": 1}', flush=True); raise SystemExit('wrong')", "failed", 1),
        ("print('no JSON')", "failed", 0),
    ],
)
def test_a_phase_is_ok_only_if_it_ends_well_and_finds_something(tmp_path, code, status, kept):
    assert attempt(tmp_path, code) == status
    *found, last = lines(tmp_path)
    assert (len(found), last["status"]) == (kept, status)
    assert ("wrong" in last.get("error", "")) == ("wrong" in code)


@pytest.mark.parametrize("name", PHASES)
def test_every_phase_can_be_loaded(name):
    assert callable(importlib.import_module(f"gpu_phases.{PHASES[name].module}").find)


def test_two_calls_give_every_phase():
    assert set(CALLS["1"]) | set(CALLS["2"]) == set(PHASES)
    assert "shards" in CALLS["1"]
    assert "shards" in CALLS["2"]  # a machine that is lent anew has no data


@pytest.mark.parametrize("seconds", [60.0, 240.0, 600.0])
@pytest.mark.parametrize("rates", [{}, {"teachers": 30_000.0, "student": 9_000.0, "matching": 4_000.0}])
def test_the_last_runs_fit_the_time_that_is_left(seconds, rates):
    config = command_line.parse(["--preset", "cifar10", *run.sized(seconds, rates)]).config
    known = {**run.SLOW, **rates}
    row = run.ROWS * config.report.epochs * config.report.batch
    of_an_epoch = run.TRAININGS * run.TRAIN_IMAGES
    images = {
        "teachers": config.teachers.epochs * of_an_epoch,
        "matching": config.matching.steps * config.matching.batch,
        "student": config.report.seeds * row,
    }
    least = {"teachers": 2 * of_an_epoch, "matching": 200 * 256, "student": row}
    for step, share in run.SHARES.items():
        assert images[step] <= max(0.75 * share * seconds * known[step] / run.RUNS, least[step])
    assert (config.report.ipc, config.report.protocol) == ((10,), ("regenerate",))
    assert (config.report.epochs, config.report.batch) == (1_000, 10 * 10)  # a step an epoch


def test_rates_are_read_from_a_record(tmp_path):
    record = tmp_path / "gpu.jsonl"
    rows = [
        ("speed/bf16", "teachers", 100.0),
        ("speed/bf16", "teachers", 40.0),
        ("speed/bf16", "gan", 7.0),
        ("speed/fp16", "gan", 9.0),
    ]
    text = [{"phase": p, "step": s, "images_per_second": r} for p, s, r in rows] + [
        {"phase": "speed/bf16", "status": "ok"}
    ]
    record.write_text("".join(json.dumps(line) + "\n" for line in text))
    assert run.measured(record) == {"teachers": 40.0, "gan": 7.0}
    assert run.measured(tmp_path / "none") == {}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_taken_where_the_trainer_has_its_switch(variant):
    settings = bench.switch(variant)
    if settings is None:
        assert variant in ("tf32", "deterministic", "channels_first", "compile")
        assert not bench.exists(variant)
        assert not bench.exists("precision", variant)
    else:
        command_line.parse(["--preset", "cifar10", *settings])


def test_phases_that_had_no_time_are_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["gpu.py", str(tmp_path), "--device", "cpu", "--minutes", "0", "--phases", "environment", "run"]
    )
    assert gpu.main() == 1
    assert lines(tmp_path) == [{"phase": name, "status": "no time"} for name in ("environment", "run")]
    assert "0 phases ok; not ok: environment, run" in capsys.readouterr().err
