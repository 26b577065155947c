"""Any number of ranks runs: those that do not divide a batch wait for the others, cheaply, and hear what befalls them."""

import functools
import os
import signal
import time

import hooks
import numpy as np
import pytest
import ranks
from events import scalars

from gdd_dist.training import loop

FIRST = ["teachers", "logits", "gaussian"]
LOSSES = {"gan": ("loss_g", "loss_d"), "matching": ("loss", "loss_d")}


def losses(out, step):
    found = scalars(out / "tensorboard" / step)
    return np.array([[found[f"{step}/{name}"][i] for i in range(12)] for name in LOSSES[step]])


@pytest.mark.parametrize("size", [3, 6, pytest.param(12, marks=pytest.mark.slow)])
def test_ranks_that_do_not_divide_a_batch_give_the_losses_of_one(reported, tmp_path, size):
    out = tmp_path / "out" if size == 3 else reported.copy(tmp_path / "out", *FIRST)  # 3 do all steps
    argv = [*reported.argv, "--until", "matching"]
    ended = ranks.start(out, argv, size).wait()
    assert ended.codes == [0] * size, ended.text
    taking = {3: 2, 6: 4, 12: 8}[size]
    for step in LOSSES:
        said = (
            f"{size - taking} of {size} ranks wait during {step}, whose batch they cannot share evenly; --{step}.batch "
        )
        assert sum(err.count(said) for err in ended.err) == 1
        assert np.allclose(losses(out, step), losses(reported.out, step), rtol=1e-4, atol=0)
    found = ranks.steps(out)
    assert all(found[step]["fingerprint"] == reported.steps[step]["fingerprint"] for step in LOSSES)


class Paused(loop.Watcher):
    """Rank 0 stands still before the fifth step of the gan until FOLDER/go is there."""

    def __init__(self, folder):
        self._folder = folder

    def before_step(self, trainee, step):
        if trainee.name == "gan" and step == 5:
            (self._folder / "here").touch()
            while not (self._folder / "go").exists():
                time.sleep(0.02)


def paused(rank, folder):
    if rank == 0:
        loop.watchers.append(Paused(folder))


def begin(reported, tmp_path, *argv):
    """Three ranks, of which the last waits for the gan's other two, which stand in their fifth step."""
    out = reported.copy(tmp_path / "out", *FIRST)
    argv = [*reported.argv, "--checkpoint_seconds", "100000", "--until", "gan", *argv]
    job = ranks.start(out, argv, 3, before=functools.partial(paused, folder=tmp_path))
    job.until((tmp_path / "here").exists)
    return out, argv, job


def cpu_seconds(pid):
    with open(f"/proc/{pid}/stat") as f:
        fields = f.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_who_waits_burns_no_core_and_is_not_missed_however_long_it_takes(reported, tmp_path):
    _, _, job = begin(reported, tmp_path, "--timeout", "4")
    waits = job.processes[2].pid
    time.sleep(3)
    before, begun = cpu_seconds(waits), time.monotonic()
    time.sleep(7)  # more than the timeout
    share = (cpu_seconds(waits) - before) / (time.monotonic() - begun)
    (tmp_path / "go").touch()
    ended = job.wait()
    assert ended.codes == [0, 0, 0], ended.text
    assert share < 0.1


@pytest.mark.parametrize("rank", [1, 2])
def test_a_signal_to_one_who_works_or_waits_stops_all_and_loses_nothing(reported, tmp_path, rank):
    out, argv, job = begin(reported, tmp_path)
    job.send(signal.SIGTERM, rank)
    time.sleep(1.5)
    (tmp_path / "go").touch()
    ended = job.wait()
    assert ended.codes == [143] * 3, ended.text
    assert all("all is saved, run the same command again to continue" in err for err in ended.err), ended.text
    found = ranks.train(out, argv, 3)
    assert found["gan"]["status"] == "resumed"
    assert np.allclose(losses(out, "gan"), losses(reported.out, "gan"), rtol=1e-4, atol=0)


def test_who_waits_hears_that_another_failed(reported, tmp_path):
    out = reported.copy(tmp_path / "out", *FIRST)
    fail = functools.partial(
        hooks.call_in, where="gan", call=5, action=functools.partial(hooks.fail_writes, 28), victim=0
    )
    argv = [*reported.argv, "--checkpoint_seconds", "0", "--until", "gan"]
    ended = ranks.start(out, argv, 3, before=fail).wait()
    assert len(ended.errors) == 1, ended.text
    assert ended.codes == [2, 2, 2], ended.text
    assert "stopped: rank 2, because another rank failed" in ended.err[2]


def test_one_who_waits_and_is_lost_is_missed(reported, tmp_path):
    _, _, job = begin(reported, tmp_path, "--timeout", "4")
    job.send(signal.SIGKILL, 2)
    ended = job.wait(60)
    assert ended.codes == [2, 2, -9], ended.text
    assert len(ended.errors) == 1, ended.text
    assert "error: rank 2 (" in ended.errors[0]
