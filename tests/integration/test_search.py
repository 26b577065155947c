"""A local search from one end to the other; killed, it goes on where it was; trials that fail are written down and end nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
import ranks
import stores
import yaml
from searching import (
    REUSED,
    ROOT,
    Running,
    assert_shared,
    family,
    gone,
    listening,
    open_trials,
    outcomes,
    progress,
    refused,
    search,
    steps,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gdd_dist.users import planned, read_run
from tune import space
from tune.cluster import Node, check_resources
from tune.options import Options
from tune.proposals import Proposals

pytest.importorskip("ray")

LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
TOO_MUCH = 10**17
"""A batch that no machine's address space holds."""
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
        proposals = Proposals(axes, "random", seed)
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
    assert [shared[s]["status"] for s in ("teachers", "logits", "gan")] == ["computed"] * 3
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
    assert [step["status"] for step in trained.values()] == ["reused"] * 5 + ["computed"]
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
        assert [found[step]["status"] for step in REUSED] == ["reused"] * 4
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
    assert "--resume goes on with it" in refused(searched.out, searched.argv)


def test_resources_that_no_node_has_are_told_at_once(tmp_path):
    hosts = [Node("a", "10.0.0.1", 4, 0), Node("b", "10.0.0.2", 2, 0)]
    assert check_resources(Options(cpus_per_trial=2), hosts) == 3
    for options, words in (
        (Options(cpus_per_trial=5), "no node has the 5 CPUs of a rank .10.0.0.1: 4 CPUs, 0 GPUs, 10.0.0.2"),
        (Options(gpus_per_trial=1), "no node has the 1 CPUs and 1 GPUs"),
        (Options(ranks_per_trial=7), "holds 6 ranks of 1 CPUs, fewer than --ranks-per-trial 7"),
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


SLOW = ["--matching.steps", "60", "--matching.interval", "10", "--checkpoint_seconds", "0"]


@pytest.mark.slow
def test_killed_it_goes_on_where_it_was_and_reads_no_test_data(tiny, digits, tmp_path):
    """SIGKILL of the driver in the middle of trials; nothing of Ray is left; then --resume, with Ray's own state torn besides."""
    data = shutil.copytree(digits, tmp_path / "data")
    for path in (data / "test").iterdir():
        path.unlink()  # whoever opens test fails
    argv = [*tiny, *SLOW, "--data", str(data), "--no-verify", "--trials", "4", "--final-seeds", "0"]
    out = tmp_path / "out"
    running = Running(out, argv)

    def midway() -> bool:
        """One trial has ended, and another is past its second report."""
        return bool(outcomes(out)) and bool(open_trials(out, 3))

    running.until(lambda: len(progress(out, "000")) >= 1)
    processes = family(running.process.pid)
    assert len(processes) >= 4  # the driver, Ray's own, a trial
    assert listening(processes) <= LOOPBACK
    assert listening(processes)
    running.until(midway)
    processes |= family(running.process.pid)
    running.process.send_signal(signal.SIGKILL)
    running.wait()
    ended = outcomes(out)
    open_ = open_trials(out, 3)
    assert ended
    assert open_
    written = {p: p.stat().st_mtime_ns for name in ended for p in (out / "trials" / name).rglob("*") if p.is_file()}
    for path in (out / "ray").glob("*/*.pkl"):
        path.write_bytes(path.read_bytes()[:-20])

    again = search(out, ["--resume"])
    found = outcomes(out)
    assert sorted(found) == ["000", "001", "002", "003"]
    assert {name: found[name] for name in ended} == ended
    assert all(p.stat().st_mtime_ns == t for p, t in written.items())
    assert "is damaged; nothing is lost" in again.text()
    assert_shared(out)
    for name in open_:
        assert found[name]["status"] in ("finished", "stopped")
        if found[name]["status"] == "finished":
            # Never computed anew; reused where its worker came to the end before it noticed that its driver was gone.
            assert steps(out, name)["matching"]["status"] in ("resumed", "reused")
            assert_same_as_undisturbed(out, name, tmp_path / f"alone-{name}")
    assert not gone(processes)  # Ray's agents look for their raylet now and then only


@pytest.mark.slow
def test_interrupted_it_leaves_nothing_behind_and_a_trial_that_loses_its_process_goes_on(tiny, tmp_path):
    """Ctrl-C, then SIGTERM, then SIGKILL of a trial's process, as the kernel sends it when memory runs out."""
    out, argv = tmp_path / "out", [*tiny, *SLOW, "--trials", "3", "--scheduler", "fifo", "--final-seeds", "0"]
    with tempfile.TemporaryDirectory(dir="/tmp") as files:  # Ray's sockets need a short path
        env = {"RAY_TMPDIR": files}
        for number, more in ((signal.SIGINT, []), (signal.SIGTERM, ["--resume"])):
            running = Running(out, [*argv, *more], env)
            before = {name: len(progress(out, name)) for name in open_trials(out)}
            running.until(lambda was=before: any(len(progress(out, n)) > was.get(n, 0) for n in open_trials(out, 2)))
            assert any(Path(files).iterdir())
            processes = family(running.process.pid)
            os.killpg(running.process.pid, number)  # the whole group, as a terminal does
            assert running.wait() == 130, running.text()
            assert "--resume goes on from where it was" in running.text()
            assert "Traceback" not in running.text()
            assert not gone(processes)
            assert not any(Path(files).iterdir())

        running = Running(out, [*argv, "--resume"], env)
        running.until(lambda: any((out / "matching").glob("*.lock")))
        running.until(lambda: bool(open_trials(out, 3)))
        (robbed, *_) = open_trials(out, 3)
        lock = out / "matching" / f"{matching_of(out, robbed)}.lock"
        os.kill(json.loads(lock.read_text())["pid"], signal.SIGKILL)
        assert running.wait() == 0, running.text()
        assert not any(Path(files).iterdir())
    assert f"trial {robbed}: lost its process or node" in running.text()
    assert {line["status"] for line in outcomes(out).values()} == {"finished"}
    assert len(outcomes(out)) == 3
    assert steps(out, robbed)["matching"]["status"] == "resumed"
    assert_same_as_undisturbed(out, robbed, tmp_path / "alone")
    left = [p for p in out.rglob("*") if p.name.startswith(".") or p.suffix in (".lock", ".dead", ".partial")]
    assert not [p for p in left if out / "ray" not in p.parents]


def matching_of(out: Path, trial: str) -> str:
    """The fingerprint of the matching step that a trial is at."""
    plan = planned(out / "trials" / trial, read_run(out / "trials" / trial), "float32")
    assert plan is not None
    return plan["matching"]


@pytest.mark.slow
def test_remote_data_on_the_store_of_a_finished_run(undisturbed, tiny, digits, tmp_path):
    """Two ranks a trial; nothing that the store holds is computed, and trial 0 is what the trainer would compute from local data."""
    server = stores.Store()
    try:
        argv = ["--data", server.upload(digits, "digits"), *tiny[2:]]
        store = undisturbed.copy(tmp_path / "store", "teachers", "logits", "gan")
        argv += ["--store", str(store), "--loader.cache_dir", str(tmp_path / "cache"), "--loader.resident", "none"]
        argv += ["--trials", "2", "--ranks-per-trial", "2", "--final-seeds", "1", "--scheduler", "fifo"]
        search(tmp_path / "out", argv, server.environment)
        assert all(count == 1 for count in server.downloads().values())
        assert server.downloads()
    finally:
        server.close()
    out = tmp_path / "out"
    assert [line["status"] for line in outcomes(out).values()] == ["finished"] * 2
    assert outcomes(out)["000"]["fingerprint"] == undisturbed.steps["matching"]["fingerprint"]
    for step in REUSED[1:]:
        assert len([p for p in (store / step).iterdir() if p.is_dir()]) == 1
        assert not (out / step).exists()
    assert "computed by another run on this store" in (out / "search.md").read_text()
    assert json.loads((out / "final.json").read_text())["seeds"] == [1]


@pytest.mark.slow
def test_out_of_time_it_keeps_what_it_has_and_resume_does_the_rest(tiny, tmp_path):
    argv = [*tiny, *SLOW, "--trials", "3", "--scheduler", "fifo", "--final-seeds", "0"]
    out = tmp_path / "out"
    assert "no trial has finished" in refused(out, [*argv, "--time-budget", "1s"])
    begun = {p.name for p in (out / "trials").iterdir()}
    assert begun
    assert not outcomes(out)
    search(out, [*argv, "--resume"])
    assert {line["status"] for line in outcomes(out).values()} == {"finished"}
    assert len(outcomes(out)) == 3
    assert begun <= outcomes(out).keys()


def assert_same_as_undisturbed(out: Path, name: str, alone: Path) -> None:
    """A trial that was interrupted gives the weights that the trainer gives in one go."""
    trial = out / "trials" / name
    for step in ("teachers", "logits", "gan"):
        link = trial / step / "latest"
        shutil.copytree(link.resolve(), alone / step / link.resolve().name)
    argv = ["--config", str(trial / "config.yaml"), "--store", str(alone)]
    found = ranks.train(alone, argv)
    assert found["matching"]["status"] == "computed"
    assert found["matching"]["fingerprint"] == steps(out, name)["matching"]["fingerprint"]
    one, two = (p / "matching" / "latest" / "generator.safetensors" for p in (trial, alone))
    assert ranks.weights(one) == ranks.weights(two)


@pytest.mark.slow
def test_the_benchmark_prints_both_its_lines(tiny, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "search.py"), "--trials", "2", "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, "--", *tiny], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["benchmark"] for line in lines] == ["search-overhead", "search-reuse"]
    for line in lines:
        assert line.keys() >= {"ours", "other", "unit", "ratio", "settings", "machine", "versions"}
        assert line["ratio"] == pytest.approx(min(line["other"].values()) / line["ours"], rel=0.01)
        assert line["ours"] > 0
