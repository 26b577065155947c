"""A search that is killed, interrupted, out of time or robbed of a process goes on where it was; remote data; its benchmark."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
import ranks
import stores
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

from gdd_dist.pipeline.store_users import plans_of

pytest.importorskip("ray")
pytestmark = pytest.mark.slow  # each runs several searches, or a long one

LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
SLOW = ["--matching.steps", "60", "--matching.interval", "10", "--checkpoint_seconds", "0"]


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
            assert "run the same command with --resume to continue" in running.text()
            assert "Traceback" not in running.text()
            assert not gone(processes)
            assert not any(Path(files).iterdir())

        running = Running(out, [*argv, "--resume"], env)
        held: dict[str, int] = {}
        running.until(lambda: held.update(at_work(out, 3)) or bool(held))
        robbed, pid = next(iter(held.items()))
        os.kill(pid, signal.SIGKILL)
        assert running.wait() == 0, running.text()
        assert not any(Path(files).iterdir())
    assert f"trial {robbed}: lost its process or node" in running.text()
    assert {line["status"] for line in outcomes(out).values()} == {"finished"}
    assert len(outcomes(out)) == 3
    assert steps(out, robbed)["matching"]["status"] == "resumed"
    assert_same_as_undisturbed(out, robbed, tmp_path / "alone")
    left = [p for p in out.rglob("*") if p.name.startswith(".") or p.suffix in (".lock", ".dead", ".partial")]
    assert not [p for p in left if out / "ray" not in p.parents]


def at_work(out: Path, reports: int) -> dict[str, int]:
    """Trial → its process, of those that hold the lock of their matching step; a lock may be a dead one's."""
    found = {}
    for name in open_trials(out, reports):
        with suppress(OSError, ValueError):
            pid = json.loads((out / "matching" / f"{matching_of(out, name)}.lock").read_text())["pid"]
            os.kill(pid, 0)
            found[name] = pid
    return found


def matching_of(out: Path, trial: str) -> str:
    """The fingerprint of the matching step that a trial is at."""
    return plans_of(out / "trials" / trial)[0]["matching"]


def test_remote_data_on_the_store_of_a_finished_run(undisturbed, tiny, digits, tmp_path):
    """Two ranks a trial; nothing that the store holds is computed, and trial 0 is what the trainer would compute from local data."""
    server = stores.Store()
    try:
        argv = ["--data", server.upload(digits, "digits"), *tiny[2:]]
        store = undisturbed.copy(tmp_path / "store", "teachers", "logits", "gaussian", "gan")
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
    for step in ("teachers", "logits", "gaussian", "gan"):
        link = trial / step / "latest"
        shutil.copytree(link.resolve(), alone / step / link.resolve().name)
    argv = ["--config", str(trial / "config.yaml"), "--store", str(alone)]
    found = ranks.train(alone, argv)
    assert found["matching"]["status"] == "computed"
    assert found["matching"]["fingerprint"] == steps(out, name)["matching"]["fingerprint"]
    one, two = (p / "matching" / "latest" / "generator.safetensors" for p in (trial, alone))
    assert ranks.weights(one) == ranks.weights(two)


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
