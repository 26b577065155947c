"""A study with a real Ray: killed, gone on with and given one more seed; every seed on the same GAN; the table from what trials reached."""

import json
import signal

import numpy as np
import pytest
import yaml
from scipy.stats import ttest_rel
from searching import Running, assert_shared, outcomes, search, steps
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytest.importorskip("ray")


def test_a_study_that_was_killed_goes_on_and_takes_more_seeds(tiny, tmp_path):
    (tmp_path / "space.yaml").write_text("matching.loss: {choices: [skd, kd]}\n")
    argv = [*tiny, "--gan.start", "gaussian", "--algorithm", "grid", "--space", str(tmp_path / "space.yaml")]
    out = tmp_path / "out"
    running = Running(out, [*argv, "--seeds", "2", "--matching.select", "last", "--matching.lr", "0.01"])
    running.until(lambda: len(outcomes(out)) >= 1)
    running.process.send_signal(signal.SIGKILL)
    running.wait()
    ended = outcomes(out)

    again = search(out, ["--resume", "--seeds", "3"])
    found = outcomes(out)
    kd = {"matching.loss": "kd"}
    seeds = [{}, {"matching.seed": 1}, {"matching.seed": 2}]
    wanted = [{**arm, **seed} for seed in seeds for arm in ({}, kd)]
    assert [found[f"{n:03d}"]["settings"] for n in range(6)] == wanted
    assert len(found) == 6
    assert {name: found[name] for name in ended} == ended
    assert {line["status"] for line in found.values()} == {"finished"}
    assert len({line["fingerprint"] for line in found.values()}) == 6
    assert_shared(out)
    assert len({steps(out, name)["gan"]["fingerprint"] for name in found}) == 1

    plain, other = ([found[f"{n:03d}"]["val"] for n in range(k, 6, 2)] for k in (0, 1))
    histories = [
        json.loads(p.read_text().splitlines()[-1])["history"] for p in sorted(out.glob("trials/*/progress.jsonl"))
    ]
    assert [h[-1]["val"] for h in histories] == [found[name]["val"] for name in sorted(found)]  # select last
    test, d = ttest_rel(other, plain), np.subtract(other, plain)
    page = (out / "search.md").read_text()
    error = d.std(ddof=1) / 3**0.5
    assert f"| {d.mean():+.2f} ± {error:.2f} | {test.statistic:.2f} | {test.pvalue:.2g} |" in page
    assert f"{np.mean(plain):.2f} ± {np.std(plain, ddof=1) / 3**0.5:.2f}" in again.text()
    best = yaml.safe_load((out / "best.yaml").read_text())
    assert best["matching"]["loss"] == ("kd" if d.mean() > 0 else "skd")
    assert not (out / "final").exists()
    events = EventAccumulator(str(out / "tensorboard" / "005")).Reload()
    assert "_hparams_/session_start_info" in events.PluginTagToContent("hparams")
