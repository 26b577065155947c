"""What only the real torchrun shows: statuses, one error line, and that its ranks end with it."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import ranks

LONG_GAN = ["--gan.steps", "150", "--until", "gan"]


def rank_pids(launcher: int) -> dict[int, int]:
    """Rank → process id of the ranks that a torchrun has started."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                environment = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if parent == launcher:
                found |= {int(v[5:]): int(entry.name) for v in environment if v.startswith(b"RANK=")}
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, timeout=120.0):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "what the test waited for never came"
        time.sleep(0.02)


def steps_done(out: Path) -> int:
    """The step of the gan's newest checkpoint."""
    return max((int(p.stem[5:]) for p in out.glob("gan/*.partial/checkpoints/step-*.json")), default=0)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_killed_rank_and_a_killed_torchrun_leave_nobody_behind_and_the_same_command_goes_on(
    undisturbed, tmp_path, size
):
    out = undisturbed.copy(tmp_path / "out", "teachers", "logits")
    argv = [*undisturbed.argv, *LONG_GAN, "--out", str(out)]

    with ranks.torchrun(size, argv) as job:
        wait_for(lambda: steps_done(out) >= 5)
        pids = rank_pids(job.pid)
        assert sorted(pids) == list(range(size))
        os.kill(pids[size - 1], signal.SIGKILL)
        text, _ = job.communicate(timeout=240)
    assert job.returncode == 1
    assert not any(line.startswith("error:") for line in text.splitlines()), text
    assert text.count("stopped: rank") == size - 1, text
    assert not any(alive(pid) for pid in pids.values())

    done = steps_done(out)
    with ranks.torchrun(size, argv) as job:
        wait_for(lambda: steps_done(out) >= done + 5)
        pids = rank_pids(job.pid)
        job.kill()
        job.wait()
    wait_for(lambda: not any(alive(pid) for pid in pids.values()))

    with ranks.torchrun(size, argv) as job:
        text, _ = job.communicate(timeout=240)
    assert job.returncode == 0, text
    assert ranks.steps(out)["gan"]["status"] == "resumed"


def test_a_fault_is_one_error_line_and_a_failing_status(undisturbed, digits, tmp_path):
    data = shutil.copytree(digits, tmp_path / "data")
    shard = data / "train" / "000001.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    with ranks.torchrun(2, [*undisturbed.argv, "--data", str(data), "--out", str(tmp_path / "out")]) as job:
        text, _ = job.communicate(timeout=120)
    assert job.returncode != 0
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, text
    assert str(shard) in errors[0]
    assert "exitcode  : 2" in text


@pytest.mark.slow
def test_twenty_of_twenty_finished_runs_leave_with_0(undisturbed, tmp_path):
    store = undisturbed.copy(tmp_path / "store", "teachers", "logits")
    for seed in range(20):
        out = tmp_path / f"out-{seed}"
        argv = [*undisturbed.argv, "--store", str(store), "--out", str(out), "--gan.seed", str(seed)]
        with ranks.torchrun(4, argv) as job:
            text, _ = job.communicate(timeout=300)
        assert job.returncode == 0, text
        assert ranks.steps(out)["matching"]["status"] == "computed"
        assert "terminate called" not in text


@pytest.mark.slow
def test_a_stopped_rank_0_ends_the_job_and_is_named(undisturbed, tmp_path):
    out = undisturbed.copy(tmp_path / "out", "teachers", "logits")
    argv = [*undisturbed.argv, *LONG_GAN, "--timeout", "10", "--out", str(out)]
    with ranks.torchrun(2, argv, elastic=["--shutdown-timeout=1"]) as job:
        wait_for(lambda: steps_done(out) >= 5)
        pids = rank_pids(job.pid)
        os.kill(pids[0], signal.SIGSTOP)
        text, _ = job.communicate(timeout=240)
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, text
    assert f"rank 0 (process {pids[0]} on " in errors[0]
    assert "in step gan) has sent no heartbeat for 10 s" in errors[0]
    assert not any(alive(pid) for pid in pids.values())


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_to_torchrun_saves_and_notes_the_preemption_and_the_same_command_goes_on(
    undisturbed, tmp_path, number
):
    out = undisturbed.copy(tmp_path / "out", "teachers", "logits")
    argv = [*undisturbed.argv, *LONG_GAN, "--out", str(out)]
    handled = ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    with ranks.torchrun(2, argv, elastic=handled) as job:
        wait_for(lambda: steps_done(out) >= 5)
        pids = rank_pids(job.pid)
        job.send_signal(number)
        text, _ = job.communicate(timeout=240)
    assert job.returncode != 0
    assert text.count("all is saved, run the same command again to continue") == 2, text
    assert not any(line.startswith("error:") for line in text.splitlines()), text
    assert not any(alive(pid) for pid in pids.values())
    assert json.loads((out / "preempted").read_text())["signal"] == number.name
    done = steps_done(out)
    with ranks.torchrun(2, argv) as job:
        wait_for(lambda: steps_done(out) > done)
        assert not (out / "preempted").exists()


def test_torchrun_with_max_restarts_goes_on_from_the_last_checkpoint(undisturbed, tmp_path):
    out = undisturbed.copy(tmp_path / "out", "teachers", "logits")
    with ranks.torchrun(2, [*undisturbed.argv, *LONG_GAN, "--out", str(out)], elastic=["--max-restarts=1"]) as job:
        wait_for(lambda: steps_done(out) >= 20)
        os.kill(rank_pids(job.pid)[1], signal.SIGKILL)
        text, _ = job.communicate(timeout=240)
    assert job.returncode == 0, text
    assert ranks.steps(out)["gan"]["status"] == "resumed"
    assert ranks.steps(out)["gan"]["images_processed"] < 135 * 16 * 6
