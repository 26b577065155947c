"""SIGTERM and SIGUSR1: the step is finished, all ranks agree, save, and the launcher finds OUT/preempted."""

import functools
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import hooks
import pytest
import ranks

from gdd_dist import evaluate
from gdd_dist.runtime.run_program import run_program
from gdd_dist.runtime.signals import GRACE

SELDOM = ["--checkpoint_seconds", "100000"]  # so that what is saved was saved because of the signal
FIRST = ["teachers", "logits", "gaussian", "gan"]


def same_weights(undisturbed, out, step):
    fp = undisturbed.steps[step]["fingerprint"]
    one, two = (root / step / fp for root in (undisturbed.out, out))
    names = [p.relative_to(one) for p in one.rglob("*") if p.suffix in (".safetensors", ".npy", ".pt")]
    assert names
    return all(ranks.weights(one / name) == ranks.weights(two / name) for name in names)


PLACES = {
    "teachers": ("teachers", 9, 2),
    "logits": ("steps.logits._write", 5, 2),
    "gan": ("gan", 7, 4),
    "matching": ("matching", 7, 4),
    "matching's quick students": (
        "training.classifier_fit.train_step",
        7,
        4,
    ),  # six students of five steps: some rank trains two
}

PLACED = [
    ("teachers", signal.SIGUSR1),
    ("logits", signal.SIGTERM),
    ("gan", signal.SIGTERM),
    ("matching", signal.SIGUSR1),
    ("matching's quick students", signal.SIGTERM),
]


@pytest.mark.parametrize(("place", "number"), PLACED, ids=lambda value: getattr(value, "name", value))
def test_one_rank_is_signalled_and_all_save_leave_and_go_on_to_the_same_weights(undisturbed, tmp_path, place, number):
    where, call, size = PLACES[place]
    step = place.partition("'")[0]
    out = undisturbed.copy(tmp_path / "out", *FIRST[: len(FIRST) if step == "matching" else FIRST.index(step)])
    argv = [*undisturbed.argv, *SELDOM, "--until", step]
    victim = None if place in ("logits", "matching's quick students") else 1  # dealt: no rank is sure of its share
    hook = functools.partial(hooks.signal_in, where=where, call=call, number=number, victim=victim)
    ended = ranks.start(out, argv, size, before=hook).wait()
    assert ended.codes == [128 + number] * size, ended.text
    assert not ended.errors
    line = f"by {number.name}; all is saved, run the same command again to continue"
    assert all(line in err for err in ended.err), ended.text
    note = json.loads((out / "preempted").read_text())
    assert (note["signal"], note["step"]) == (number.name, step)

    found = ranks.train(out, argv, size)
    assert not (out / "preempted").exists()
    assert found[step]["status"] == "resumed"
    assert 0 < found[step]["images_processed"] <= undisturbed.steps[step]["images_processed"]
    assert same_weights(undisturbed, out, step)


def test_a_preempted_report_goes_on_by_student(reported, tmp_path):
    out = reported.copy(tmp_path / "out", "teachers", "logits", "gaussian", "gan", "matching")
    hook = functools.partial(
        hooks.signal_in, where="evaluation.student_results.save_record", call=6, number=signal.SIGTERM, victim=0
    )
    ended = ranks.start(out, reported.argv, 2, before=hook).wait()
    assert ended.codes == [143, 143], ended.text
    assert json.loads((out / "preempted").read_text())["step"] == "report"
    found = ranks.train(out, reported.argv, 2)
    assert found["report"]["status"] == "resumed"
    assert 0 < found["report"]["images_processed"] < 0.9 * reported.steps["report"]["images_processed"]


def test_a_signal_in_the_last_step_loses_nothing_of_the_loop(undisturbed, tmp_path):
    out = undisturbed.copy(tmp_path / "out", "teachers", "logits")
    argv = [*undisturbed.argv, *SELDOM, "--until", "gan"]
    hook = functools.partial(hooks.signal_in, where="gan", call=11, number=signal.SIGTERM, victim=1)
    ended = ranks.start(out, argv, 4, before=hook).wait()
    assert ended.codes == [143] * 4, ended.text
    found = ranks.train(out, argv, 4)
    settling = 2 * 2 * 4  # engines × forwards × ranks
    assert (found["gan"]["status"], found["gan"]["images_processed"]) == ("resumed", settling)
    assert same_weights(undisturbed, out, "gan")


def run_evaluate(rank, argv, before):
    before(rank)
    run_program(evaluate.main, argv)


def test_evaluate_too_leaves_word_that_it_was_preempted_and_goes_on_by_student(reported, tmp_path):
    out = shutil.copytree(reported.out, tmp_path / "out", symlinks=True)
    argv = [str(out), "--ipc", "2", "--baselines", "gan", "--labels", "hard", "--device", "cpu"]
    hook = functools.partial(
        hooks.signal_in, where="evaluation.student_results.save_record", call=1, number=signal.SIGUSR1, victim=0
    )
    before = set(out.glob("report/rows/*.json"))
    ended = ranks.launch(tmp_path / "one", 2, run_evaluate, (argv, hook)).wait()
    assert ended.codes == [138, 138], ended.text
    line = "by SIGUSR1; all is saved, run the same command again to continue"
    assert all(line in err for err in ended.err), ended.text
    note = json.loads((out / "preempted").read_text())
    assert (note["signal"], note["step"]) == ("SIGUSR1", "evaluate")
    kept = {p: p.stat().st_mtime_ns for p in set(out.glob("report/rows/*.json")) - before}
    assert 1 < len(kept) < 8

    ended = ranks.launch(tmp_path / "two", 2, run_evaluate, (argv, hooks.nothing)).wait()
    assert ended.codes == [0, 0], ended.text
    assert not (out / "preempted").exists()
    assert kept == {p: p.stat().st_mtime_ns for p in kept}
    assert len(json.loads((out / "evaluate.json").read_text())["results"]) == 4


def test_when_a_peer_does_not_answer_nothing_is_saved_and_nobody_waits_longer_than_agreed(undisturbed, tmp_path):
    """As when torchrun asks the others to stop because one is gone."""
    out = undisturbed.copy(tmp_path / "out", "teachers", "logits")
    hook = functools.partial(hooks.signal_in, where="gan", call=4, number=signal.SIGSTOP, victim=1)
    job = ranks.start(out, [*undisturbed.argv, *SELDOM, "--until", "gan"], 2, before=hook)
    job.until(lambda: stopped(job.processes[1].pid))
    begin = time.monotonic()
    job.send(signal.SIGTERM, 0)
    job.until(lambda: job.processes[0].exitcode is not None)
    assert time.monotonic() - begin > GRACE - 1
    job.send(signal.SIGKILL)
    ended = job.wait()
    assert ended.codes[0] == 143
    said = re.search(
        r"without saving: the ranks did not agree within (\d+) s; the last checkpoint is intact", ended.err[0]
    )
    assert said, ended.err[0]
    assert int(said[1]) >= GRACE  # more where the machine is busy
    assert not (out / "preempted").exists()
    assert not list(out.glob("gan/*.partial/checkpoints/step-*.pt"))


def test_one_process_whose_step_does_not_end_says_so():
    program = (
        "import time; from gdd_dist.runtime.signals import asked, listen; listen('0'); asked.patient, asked.grace = True, 0.2; "
        "print('ready', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.terminate()
        assert process.wait(240) == 143
        assert b"by SIGTERM, without saving: no step ended within 0 s; " in process.stderr.read()


def test_signals_that_are_repeated_or_passed_on_are_one_preemption(undisturbed, tmp_path):
    """A launcher signals each rank, the ranks tell each other, and many launchers send their signal again."""
    out = undisturbed.copy(tmp_path / "out", "teachers", "logits")
    hook = functools.partial(hooks.hold_in_gan, until=tmp_path / "go on")
    job = ranks.start(out, [*undisturbed.argv, "--until", "gan"], 2, before=hook)
    job.until(lambda: bool(list(out.glob("gan/*.partial/checkpoints/step-*5.pt"))))
    job.send(signal.SIGTERM, 1)
    time.sleep(1.5)  # the other rank is told by now
    job.send(signal.SIGTERM)
    time.sleep(0.1)
    job.send(signal.SIGTERM)
    (tmp_path / "go on").touch()
    ended = job.wait()
    assert ended.codes == [143, 143], ended.text
    assert all("; all is saved, run the same command" in err for err in ended.err), ended.text
    assert (out / "preempted").exists()


def test_a_signal_after_the_time_to_agree_forces_the_exit():
    program = (
        "import time; from gdd_dist.runtime.signals import asked, listen; listen('0'); "
        "asked.patient, asked.grace, asked.agreed = True, 0.2, True; print('ready', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.terminate()
        time.sleep(2)
        assert process.poll() is None  # it is saving
        process.terminate()
        assert process.wait(240) == 143
        assert b"at once, by another signal after the time to agree; " in process.stderr.read()


def hold_and_mind_sigint(rank, until):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background a shell has it ignored
    hooks.hold_in_gan(rank, until)


def test_ctrl_c_ends_all_ranks_and_the_last_checkpoint_is_whole(undisturbed, tmp_path):
    """Rank 0 waits in Python, rank 1 in a collective."""
    out = undisturbed.copy(tmp_path / "out", "teachers", "logits")
    hook = functools.partial(hold_and_mind_sigint, until=tmp_path / "never")
    argv = [*undisturbed.argv, "--until", "gan"]
    job = ranks.start(out, argv, 2, before=hook)
    job.until(lambda: bool(list(out.glob("gan/*.partial/checkpoints/step-*5.json"))))
    job.send(signal.SIGINT)
    ended = job.wait()
    assert ended.codes == [130, 130], ended.text
    assert all("interrupted; run the same command again to continue" in err for err in ended.err)
    assert ranks.train(out, argv, 2)["gan"]["status"] == "resumed"


def stopped(pid):
    with open(f"/proc/{pid}/stat") as f:
        return f.read().rpartition(")")[2].split()[0] == "T"
