"""One job on a run directory; two runs on one store compute an artifact once (design 4)."""

import functools
import json
import os
import signal
import socket
import threading
import time

import hooks
import ranks

from gdd_dist.runtime.locks import DEAD_AFTER
from gdd_dist.runtime.process_identity import me


def test_a_second_job_on_the_same_out_is_told_who_holds_it(undisturbed, tmp_path):
    out = undisturbed.copy(tmp_path / "out", "teachers", "logits")
    argv = [*undisturbed.argv, "--until", "gan"]
    go = tmp_path / "go"
    first = ranks.start(out, argv, 2, before=functools.partial(hooks.hold_in_gan, until=go))
    first.until(lambda: (out / "run.lock").exists())
    line = ranks.refused(out, argv, 2)
    assert f"process {first.processes[0].pid} on {socket.gethostname()}" in line
    assert str(out) in line
    assert "--out" in line
    go.touch()
    ended = first.wait()
    assert ended.codes == [0, 0], ended.text
    assert ranks.steps(out)["gan"]["status"] == "computed"
    assert not (out / "run.lock").exists()


def test_two_runs_on_one_store_compute_an_artifact_once(undisturbed, tmp_path):
    store = undisturbed.copy(tmp_path / "store", "teachers", "logits")
    argv = [*undisturbed.argv, "--store", str(store), "--until", "gan"]
    go = tmp_path / "go"
    first = ranks.start(tmp_path / "one", argv, 2, before=functools.partial(hooks.hold_in_gan, until=go))
    first.until(lambda: bool(list((store / "gan").glob("*.lock"))))
    second = ranks.start(tmp_path / "two", argv, 2, before=hooks.no_forward)
    second.until(lambda: "gan: waiting for process" in second.err())
    assert f"process {first.processes[0].pid} " in second.err()
    go.touch()
    for job in (first, second):
        ended = job.wait()
        assert ended.codes == [0, 0], ended.text
    one, two = (ranks.steps(tmp_path / name)["gan"] for name in ("one", "two"))
    assert (one["status"], two["status"]) == ("computed", "reused")
    assert one["images_processed"] > two["images_processed"] == 0
    assert (tmp_path / "two" / "gan" / "latest").resolve() == store / "gan" / one["fingerprint"]
    assert second.err().count("waiting for process") == 1


def test_when_the_computing_run_dies_the_waiting_one_goes_on_from_its_checkpoint(undisturbed, tmp_path):
    store = undisturbed.copy(tmp_path / "store", "teachers", "logits")
    argv = [*undisturbed.argv, "--store", str(store), "--until", "gan"]
    first = ranks.start(
        tmp_path / "one", argv, 2, before=functools.partial(hooks.hold_in_gan, until=tmp_path / "never")
    )
    first.until(lambda: bool(list(store.glob("gan/*.partial/checkpoints/step-*5.pt"))))
    second = ranks.start(tmp_path / "two", argv, 2)
    second.until(lambda: "gan: waiting for process" in second.err())
    first.send(signal.SIGKILL)
    first.wait()
    ended = second.wait()
    assert ended.codes == [0, 0], ended.text
    assert ranks.steps(tmp_path / "two")["gan"]["status"] == "resumed"


def foreign(out, **changes):
    """A run.lock as a job on another host left it."""
    holder = {**me(), "space": "another boot", "host": "elsewhere", "pid": 77, "since": "2020-01-01", "id": "x" * 32}
    out.mkdir(parents=True, exist_ok=True)
    path = out / "run.lock"
    path.write_text(json.dumps(holder | changes))
    return path


def test_a_job_that_lives_on_another_host_keeps_its_out(tiny, tmp_path):
    path, stop = foreign(tmp_path / "out"), threading.Event()

    def beat():
        while not stop.wait(0.3):
            path.touch()

    threading.Thread(target=beat, daemon=True).start()
    try:
        line = ranks.refused(tmp_path / "out", [*tiny, "--until", "shards"])
    finally:
        stop.set()
    assert "is in use by process 77 on elsewhere since 2020-01-01" in line


def test_a_job_that_died_on_another_host_is_taken_over_after_a_minute_without_a_sign(tiny, tmp_path):
    path = foreign(tmp_path / "out")
    a_while_ago = time.time() - DEAD_AFTER + 3
    os.utime(path, (a_while_ago, a_while_ago))
    job = ranks.start(tmp_path / "out", [*tiny, "--until", "shards"])
    ended = job.wait()
    assert ended.codes == [0], ended.text
    assert "is locked by process 77 on elsewhere; waiting a minute to see whether" in ended.err[0]
