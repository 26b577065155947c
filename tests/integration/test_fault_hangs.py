"""A rank that is stopped ends the job within --timeout, named with its step; a rank that is busy is waited for."""

import functools
import signal
import socket

import hooks
import pytest
import ranks

TIMEOUT = ["--timeout", "10"]
PLACES = {
    "teachers": ("teachers", []),
    "logits": ("steps.logits._write", ["teachers"]),
    "gan": ("gan", ["teachers", "logits"]),
    "report": ("training.classifier_fit.train_step", ["teachers", "logits", "gaussian", "gan", "matching"]),
}


def case(step, victim, fast):
    return pytest.param(step, victim, id=f"rank {victim} in {step}", marks=[] if fast else [pytest.mark.slow])


@pytest.mark.parametrize(
    ("step", "victim"),
    [
        case("teachers", 1, fast=True),
        case("logits", 1, fast=False),
        case("gan", 1, fast=True),
        case("report", 1, fast=False),
    ],
)
def test_a_stopped_rank_ends_the_job_and_is_named_with_its_step(undisturbed, tmp_path, step, victim):
    where, before = PLACES[step]
    out = undisturbed.copy(tmp_path / "out", *before)
    hook = functools.partial(hooks.signal_in, where=where, call=2, number=signal.SIGSTOP, victim=victim)
    job = ranks.start(out, [*undisturbed.argv, *TIMEOUT, "--until", step], 2, before=hook)
    other = job.processes[1 - victim]
    job.until(lambda: other.exitcode is not None)
    stopped = job.processes[victim]
    ended = job.wait()  # the stopped one was ended too
    assert (ended.codes[1 - victim], ended.codes[victim]) == (2, -signal.SIGKILL), ended.text
    assert len(ended.errors) == 1, ended.text
    who = f"rank {victim} (process {stopped.pid} on {socket.gethostname()}, in step {step})"
    assert f"{who} has sent no heartbeat for 10 s" in ended.errors[0]
    assert "run the same command again" in ended.errors[0]
    assert "Traceback" not in ended.text
    ranks.train(out, [*undisturbed.argv, "--until", step], 2)  # the lock of the dead is no hindrance


@pytest.mark.slow
def test_without_torchrun_a_stopped_rank_0_takes_the_store_with_it_and_the_others_still_end(undisturbed, tmp_path):
    out = undisturbed.copy(tmp_path / "out", "teachers", "logits")
    hook = functools.partial(hooks.signal_in, where="gan", call=2, number=signal.SIGSTOP, victim=0)
    job = ranks.start(out, [*undisturbed.argv, *TIMEOUT, "--until", "gan"], 4, before=hook)
    job.until(lambda: all(p.exitcode is not None for p in job.processes[1:]))
    job.send(signal.SIGKILL)
    ended = job.wait()
    assert ended.codes == [-9, 2, 2, 2], ended.text
    assert len(ended.errors) == 1, ended.text
    assert "has not reached 127.0.0.1 for 10 s in step gan" in ended.errors[0]


def test_a_busy_rank_is_waited_for_however_long_it_takes(undisturbed, tmp_path):
    hook = functools.partial(hooks.busy_in, where="teachers", call=3, seconds=20, victim=1)
    found = ranks.train(tmp_path / "out", [*undisturbed.argv, "--timeout", "10", "--until", "teachers"], 2, before=hook)
    assert found["teachers"]["status"] == "computed"


def test_a_job_that_was_suspended_as_a_whole_goes_on(undisturbed, tmp_path):
    out = undisturbed.copy(tmp_path / "out", "teachers", "logits")
    go = tmp_path / "go"
    hook = functools.partial(hooks.hold_in_gan, until=go)
    job = ranks.start(out, [*undisturbed.argv, "--timeout", "10", "--until", "gan"], 2, before=hook)
    job.until(lambda: bool(list(out.glob("gan/*.partial/checkpoints/step-*5.pt"))))
    job.send(signal.SIGSTOP)
    job.processes[0].join(20)
    job.send(signal.SIGCONT)
    go.touch()
    ended = job.wait()
    assert ended.codes == [0, 0], ended.text
