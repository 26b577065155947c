"""A local search from one end to the other; trials that fail are written down and end nothing."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
import ranks
import yaml
from searching import (
    REUSED,
    ROOT,
    assert_shared,
    outcomes,
    progress,
    refused,
    search,
    steps,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gdd_dist.config.settings import Config
from tune import space
from tune.cluster import Node, check_resources
from tune.options import Options
from tune.proposals import Proposals

pytest.importorskip("ray")

TOO_MUCH = 2**31 - 16
"""A batch that the settings allow and no host holds."""
FAULTS = {
    "matching.lr": {"choices": [1.0e-4, 1.0e30]},
    "matching.batch": {"choices": [16, TOO_MUCH]},
    "matching.temperature": {"low": 1.0, "high": 4.0},
    **dict.fromkeys(
        ["matching.lambda_pair", "matching.lambda_mean", "matching.lambda_adv", "matching.teachers", "matching.views"]
    ),
}


def kind(settings) -> str:
    """How a trial with these settings must end."""
    if settings["matching.batch"] == TOO_MUCH:
        return "failed"
    return "diverged" if settings["matching.lr"] == 1.0e30 else "finished"


def faulty_seed(trials: int) -> int:
    """The first seed whose draws hold all three kinds."""
    axes = space.merged(FAULTS, "FAULTS")
    for seed in count():
        proposals = Proposals(axes, "random", Config(seed=seed))
        if {kind(proposals.propose(f"{n:03d}")) for n in range(1, trials)} == {"failed", "diverged", "finished"}:
            return seed
    raise AssertionError


@dataclass(frozen=True)
class Searched:
    out: Path
    argv: list[str]
    text: str


@pytest.fixture(scope="module")
def searched(tiny, tmp_path_factory) -> Searched:
    """Four trials of which two fail, run to the end."""
    folder = tmp_path_factory.mktemp("search")
    (folder / "space.yaml").write_text(yaml.safe_dump(FAULTS))
    argv = [*tiny, "--trials", "4", "--scheduler", "fifo", "--final-seeds", "2", "--seed", str(faulty_seed(4))]
    out = folder / "my search"  # what it says is to be typed as it stands
    running = search(out, [*argv, "--space", str(folder / "space.yaml")])
    return Searched(out, argv, running.text())


def test_every_trial_ends_once_and_is_written_down(searched):
    found = outcomes(searched.out)
    assert list(sorted(found)) == ["000", "001", "002", "003"]
    assert found["000"]["settings"] == {}
    for name, line in found.items():
        assert line["status"] == ("finished" if name == "000" else kind(line["settings"])), line
        if line["status"] == "finished":
            assert line["val"] > 0
            assert line["stderr"] >= 0
            assert (line["steps"], len(line["hosts"])) == (12, 1)
            assert line["fingerprint"] == steps(searched.out, name)["matching"]["fingerprint"]
        else:
            assert line["reason"]
            assert line["val"] is None
    assert {line["status"] for line in found.values()} == {"finished", "diverged", "failed"}
    assert len({json.dumps(line["settings"]) for line in found.values()}) == 4


def test_teachers_logits_and_gan_are_computed_once(searched):
    assert_shared(searched.out)
    shared = json.loads((searched.out / "shared" / "steps.json").read_text())["steps"]
    assert [shared[s]["status"] for s in ("teachers", "logits", "gaussian", "gan")] == ["computed"] * 4
    for name, line in outcomes(searched.out).items():
        if line["status"] == "finished":
            assert steps(searched.out, name)["matching"]["status"] == "computed"


def test_a_trial_says_what_its_quick_students_say(searched):
    for name, line in outcomes(searched.out).items():
        if line["status"] == "finished":
            history = json.loads(json.dumps(progress(searched.out, name)[-1]["history"]))
            assert [h["step"] for h in history] == [0, 6, 12]
            assert line["val"] == max(h["val"] for h in history)
            assert [p["step"] for p in progress(searched.out, name)[:-1]] == [0, 6]


def test_the_next_line_works_as_it_stands_and_matches_nothing_anew(searched, tmp_path):
    best = yaml.safe_load((searched.out / "best.yaml").read_text())
    finished = {name: line for name, line in outcomes(searched.out).items() if line["status"] == "finished"}
    winner = min(finished, key=lambda name: (-finished[name]["val"], name))
    assert best["matching"]["temperature"] == finished[winner]["settings"].get("matching.temperature", 2.0)
    (line,) = [text for text in searched.text.splitlines() if text.startswith("next: ")]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        line.removeprefix("next: "), shell=True, cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    trained = json.loads((searched.out / "best" / "steps.json").read_text())["steps"]
    assert [step["status"] for step in trained.values()] == ["reused"] * 6 + ["computed"]
    assert trained["matching"]["fingerprint"] == finished[winner]["fingerprint"]
    assert "matched" in done.stdout


def test_the_gain_is_read_on_test_with_new_seeds(searched):
    gain = json.loads((searched.out / "final.json").read_text())
    assert gain["seeds"] == [faulty_seed(4) + 1, faulty_seed(4) + 2]
    arms = {p.name for p in (searched.out / "final").iterdir()}
    assert arms == {
        f"{a}-{n}" for a in (("defaults",) if gain["trial"] == "000" else ("best", "defaults")) for n in (1, 2)
    }
    for n in (1, 2):
        found = json.loads((searched.out / "final" / f"defaults-{n}" / "steps.json").read_text())["steps"]
        assert found["matching"]["status"] == "computed"
        assert [found[step]["status"] for step in REUSED] == ["reused"] * len(REUSED)
        results = json.loads((searched.out / "final" / f"defaults-{n}" / "report/latest/metrics.json").read_text())[
            "results"
        ]
        assert gain["defaults"][n - 1] == next(r["mean"] for r in results if r["train_on"] == "matched")


def test_page_plot_and_table_show_every_trial_and_the_cost(searched):
    page = (searched.out / "search.md").read_text()
    for name, line in outcomes(searched.out).items():
        assert f"| {name}" in page
        assert line["reason"] is None or line["reason"][:20] in page
        assert f"{name} " in searched.text
    for words in ("rank-hours", "saved by early stopping", "saved by reuse", "On test", "search.png"):
        assert words in page
    assert (searched.out / "search.png").read_bytes()[:4] == b"\x89PNG"


def test_tensorboard_has_the_hparams_of_every_trial_that_measured(searched):
    root = EventAccumulator(str(searched.out / "tensorboard")).Reload()
    assert "_hparams_/experiment" in root.PluginTagToContent("hparams")
    for name, line in outcomes(searched.out).items():
        directory = searched.out / "tensorboard" / name
        assert directory.exists() == (line["status"] == "finished")
        if directory.exists():
            events = EventAccumulator(str(directory)).Reload()
            assert "_hparams_/session_start_info" in events.PluginTagToContent("hparams")
            points = [e.step for e in events.Scalars("search/val")]
            assert points == [0, 6, 12]


def test_resume_of_a_search_that_is_over_computes_nothing(searched):
    before = {p: p.stat().st_mtime_ns for p in (searched.out / "trials").rglob("*") if p.is_file()}
    again = search(searched.out, ["--resume"])
    assert "Ray" not in again.text()
    assert before == {p: p.stat().st_mtime_ns for p in (searched.out / "trials").rglob("*") if p.is_file()}
    assert again.text().count("next: torchrun") == 1


def test_a_second_search_in_the_same_place_is_refused(searched):
    assert "continue it with --resume" in refused(searched.out, searched.argv)


def test_resources_that_no_node_has_are_told_at_once(tmp_path):
    hosts = [Node("a", "10.0.0.1", 4, 0), Node("b", "10.0.0.2", 2, 0)]
    assert check_resources(Options(cpus_per_trial=2), hosts) == 3
    for options, words in (
        (Options(cpus_per_trial=5), "no node has the 5 CPUs of a rank .10.0.0.1: 4 CPUs, 0 GPUs, 10.0.0.2"),
        (Options(gpus_per_trial=1), "no node has the 1 CPUs and 1 GPUs"),
        (Options(ranks_per_trial=7), "has room for 6 ranks of 1 CPUs, fewer than --ranks-per-trial 7"),
    ):
        with pytest.raises(Exception, match=words):
            check_resources(options, hosts)
    assert "no node has the 4096 CPUs" in refused(tmp_path / "out", ["--cpus-per-trial", "4096"])
    assert not (tmp_path / "out").exists()


def test_an_address_where_nobody_answers_is_told_at_once(tmp_path, tiny):
    address = f"127.0.0.1:{ranks.free_port()}"
    assert f"no Ray cluster answers at {address}" in refused(tmp_path / "out", [*tiny, "--address", address])


def test_the_program_starts_from_anywhere_and_as_a_module(tmp_path):
    for command in ([str(ROOT / "tune" / "search.py")], ["-m", "tune.search"]):
        env = {**os.environ, "PYTHONPATH": str(ROOT) if "-m" in command else ""}
        done = subprocess.run(
            [sys.executable, *command, "--help"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "--ranks-per-trial" in done.stdout
