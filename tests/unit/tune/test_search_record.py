"""The search's own record: finished trials are never lost, whatever is torn; what --resume may change and what not."""

import dataclasses
import json
import shutil

import pytest

from sharding.errors import UserError
from tune import arguments, options
from tune.record import FINISHED, Outcome, Record, best_of


def outcome(name, val=50.0, **more):
    return Outcome(name, more.pop("status", FINISHED), {"matching.temperature": 2.5}, val=val, stderr=1.0, **more)


def test_what_is_written_is_read_back(tmp_path):
    record = Record(tmp_path)
    record.propose("001", {"matching.temperature": 2.5, "matching.teachers": "last"})
    record.finish(outcome("001", hosts=("10.0.0.1", "10.0.0.2"), kept=200, steps=400, seconds=12.5))
    assert Record(tmp_path).outcomes() == {
        "001": outcome("001", hosts=("10.0.0.1", "10.0.0.2"), kept=200, steps=400, seconds=12.5)
    }
    assert record.proposed() == {"001": {"matching.temperature": 2.5, "matching.teachers": "last"}}
    line = json.loads((tmp_path / "trials.jsonl").read_text())
    assert line.keys() >= {"id", "settings", "val", "stderr", "status"}


def test_a_torn_line_costs_its_own_trial_alone(tmp_path, capsys):
    record = Record(tmp_path)
    for name in ("000", "001", "002"):
        record.finish(outcome(name))
    path = tmp_path / "trials.jsonl"
    path.write_bytes(path.read_bytes()[:-40])  # killed in the middle of the last line
    assert list(record.outcomes()) == ["000", "001"]
    assert "line 3" in capsys.readouterr().err
    record.finish(outcome("002", val=60.0))  # begins on a line of its own
    assert list(record.outcomes()) == ["000", "001", "002"]
    assert record.outcomes()["002"].val == 60.0


def test_a_curve_is_by_step_and_of_the_last_attempt(tmp_path):
    record = Record(tmp_path)
    record.propose("001", {})
    for step, val in ((0, 1.0), (4, 2.0), (4, 2.5), (8, 3.0)):
        record.report("001", {"step": step, "val": val, "seconds": 1.0})
    assert [(line["step"], line["val"]) for line in record.curve("001")] == [(0, 1.0), (4, 2.5), (8, 3.0)]
    assert len(record.reports("001")) == 4
    assert record.curve("002") == []


def test_best_is_the_earliest_of_equals_and_was_trained_to_its_end(tmp_path):
    record = Record(tmp_path)
    record.finish(outcome("002", status="stopped", val=99.0))
    with pytest.raises(UserError, match="no trial has finished"):
        best_of(record, "val")
    record.finish(outcome("001"))
    record.finish(outcome("000"))
    record.finish(dataclasses.replace(outcome("003", val=50.5), stderr=2.0))
    assert best_of(record, "val").id == "003"
    assert best_of(record, "lower").id == "000"


def saved(tmp_path, *argv):
    search = options.parse(["--out", str(tmp_path), *argv])
    options.save(search)
    return search


def test_resume_takes_everything_from_the_search(tmp_path):
    search = saved(tmp_path, "--trials", "3", "--matching.steps", "40", "--algorithm", "optuna", "--preset", "cifar10")
    again = options.parse(["--out", str(tmp_path), "--resume"])
    assert again.resume
    assert again.options == search.options
    assert again.axes == search.axes
    assert again.preset == "cifar10"
    assert dataclasses.replace(again.config, out=None) == dataclasses.replace(search.config, out=None)
    same = ["--trials", "3", "--matching.steps", "40", "--algorithm", "optuna", "--preset", "cifar10"]
    assert options.parse(["--out", str(tmp_path), *same, "--resume"]).options == search.options


def test_resume_may_change_how_much_and_where(tmp_path):
    saved(tmp_path, "--trials", "3")
    again = options.parse(["--out", str(tmp_path), "--resume", "--trials", "9", "--ranks-per-trial", "2", "--debug"])
    assert (again.options.trials, again.options.ranks_per_trial) == (9, 2)
    assert again.config.debug


@pytest.mark.parametrize(
    "typed",
    [
        ["--scheduler", "fifo"],
        ["--metric", "lower"],
        ["--matching.steps", "7"],
        ["--seed", "5"],
        ["--data", "elsewhere"],
    ],
)
def test_resume_may_not_change_what_is_compared(tmp_path, typed, digits):
    saved(tmp_path, "--trials", "3", "--data", str(digits))
    if typed[0] == "--data":
        typed = ["--data", str(shutil.copytree(digits, tmp_path / "elsewhere"))]
    with pytest.raises(UserError, match="cannot be changed by --resume"):
        options.parse(["--out", str(tmp_path), "--resume", *typed])


def test_a_damaged_search_file_is_named(tmp_path):
    saved(tmp_path)
    path = tmp_path / "search.yaml"
    path.write_text(path.read_text()[:200])
    with pytest.raises(UserError, match="search.yaml is damaged"):
        options.parse(["--out", str(tmp_path), "--resume"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--scheduler", "pbt"], "--scheduler pbt is not known; choose asha or fifo"),
        (["--algorithm", "halton"], "--algorithm halton is not known; choose random or optuna or grid"),
        (
            ["--algorithm", "grid"],
            "a grid needs choices, and matching.temperature has none; give it .* in a --space FILE",
        ),
        (["--algorithm", "grid", "--trials", "9"], "as many trials as combinations times --seeds; leave out --trials"),
        (["--algorithm", "grid", "--scheduler", "asha"], "--scheduler asha stops trials that a grid compares"),
        (["--algorithm", "grid", "--seeds", "0"], "--seeds 0 is too small"),
        (["--seeds", "3"], "--seeds is for a grid; add --algorithm grid"),
        (["--metric", "test"], "--metric test is not known"),
        (["--trials", "0"], "--trials 0 is too small"),
        (["--trials", "many"], "invalid int value"),
        (["--max-concurrent", "-1"], "--max-concurrent -1 is too small"),
        (["--ranks-per-trial", "0"], "--ranks-per-trial 0 is too small"),
        (["--cpus-per-trial", "0"], "--cpus-per-trial 0 is too small"),
        (["--gpus-per-trial", "0.5", "--ranks-per-trial", "2"], "ranks of a trial cannot share a GPU"),
        (["--gpus-per-trial", "-1"], "--gpus-per-trial -1 is too small"),
        (["--time-budget", "soon"], "soon is not a time"),
        (["--time-budget", "0"], "must be more than 0 seconds"),
        (["--trails", "3"], "did you mean --trials"),
        (["--matching.temprature", "3"], "did you mean --matching.temperature"),
        (["--until", "gan"], "not an option of a search"),
        (["--dry-run"], "not an option of a search"),
        (["--trials"], "expected one argument"),
        (["--resume"], "holds no search to resume"),
        (["--space", "/no/such/file"], "cannot read --space"),
    ],
)
def test_wrong_use_is_one_clear_line(tmp_path, argv, words):
    with pytest.raises(UserError, match=words) as e:
        options.parse(["--out", str(tmp_path / "none"), *argv])
    assert "\n" not in str(e.value)
    assert not (tmp_path / "none").exists()


def test_keys_in_a_url_are_not_written_down(tmp_path):
    url = "https://me:secret@127.0.0.1/set"
    saved(tmp_path, "--data", url, "--preset", "digits")
    assert "secret" not in "".join(p.read_text() for p in tmp_path.iterdir())
    again = options.parse(["--out", str(tmp_path), "--resume", "--data", url])
    assert again.config.data == url
    with pytest.raises(UserError, match="--data cannot be changed"):
        options.parse(["--out", str(tmp_path), "--resume", "--data", url + "2"])


def test_the_help_has_groups_units_and_defaults(capsys):
    with pytest.raises(SystemExit, match="0"):
        options.parse(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for group in ("where:", "how much:", "what is searched, and how:", "what a trial gets:"):
        assert group in said
    for action in arguments.parser()._actions:
        assert action.option_strings[-1] in said
        if action.nargs != 0 and action.dest != "config":
            assert "default" in action.help, action.dest
    for unit in ("seconds, or 30m", "in percent", "CPU cores", "GPUs"):
        assert unit in said


@pytest.mark.parametrize(("text", "seconds"), [("90", 90.0), ("1.5m", 90.0), ("2h", 7200.0), ("30s", 30.0)])
def test_a_time_budget_has_units(tmp_path, text, seconds):
    assert options.parse(["--out", str(tmp_path), "--time-budget", text]).options.time_budget == seconds


def test_settings_of_the_trainer_hold_for_all_trials(tmp_path):
    config = tmp_path / "settings.yaml"
    config.write_text("preset: cifar10\nmatching:\n  steps: 77\n")
    argv = ["--config", str(config), "--report.ipc", "1", "10", "--trials", "4", "--matching.batch=32"]
    search = options.parse(["--out", str(tmp_path), *argv])
    assert (search.config.matching.steps, search.config.matching.batch, search.config.report.ipc) == (77, 32, (1, 10))
    assert (search.options.trials, search.preset) == (4, "cifar10")


def test_without_a_setting_the_search_is_short_and_says_so(tmp_path, capsys):
    short = options.parse(["--out", str(tmp_path), "--trials", "3"]).config.matching
    assert (short.steps, short.interval) == (300, 100)
    assert options.parse(["--out", str(tmp_path), "--seed", "1"]).config.matching.steps > short.steps
    with pytest.raises(SystemExit):
        options.parse(["--help"])
    assert "300 steps of matching" in " ".join(capsys.readouterr().out.split())
