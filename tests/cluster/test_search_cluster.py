"""Trials on three nodes: a node lost, another added, ranks of one trial on two nodes, a job that waits for a node to join."""

import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import ranks

sys.path.insert(0, str(Path(__file__).parent))
from events import scalars
from rayhosts import ENVIRONMENT, Hosts
from searching import Running, assert_shared, nodes_of, open_trials, outcomes, progress, refused, search, steps

pytest.importorskip("ray")
pytestmark = pytest.mark.slow  # minutes: a cluster of three nodes is started


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """A head without CPUs and three nodes of one CPU."""
    cluster = Hosts(tmp_path_factory.mktemp("hosts"))
    cluster.nodes = [cluster.add() for _ in range(3)]
    yield cluster
    cluster.close()


def test_ranks_of_a_trial_on_two_nodes_compute_what_one_rank_does(hosts, tiny, tmp_path):
    argv = [*tiny, "--matching.steps", "24", "--matching.interval", "4", "--trials", "5", "--final-seeds", "0"]
    out = tmp_path / "out"
    search(out, [*argv, "--address", hosts.address, "--ranks-per-trial", "2"], ENVIRONMENT)
    found = outcomes(out)
    assert len(found) == 5
    assert {line["status"] for line in found.values()} == {"finished", "stopped"}
    assert_idle(hosts)  # what was stopped freed both nodes
    assert_shared(out)

    trial, alone = out / "trials" / "000", tmp_path / "alone"
    for step in ("teachers", "logits", "gaussian", "gan"):
        whole = (trial / step / "latest").resolve()
        shutil.copytree(whole, alone / step / whole.name)
    again = ranks.train(alone, ["--config", str(trial / "config.yaml"), "--store", str(alone)])
    assert again["matching"]["fingerprint"] == found["000"]["fingerprint"]
    two, one = (scalars(p / "tensorboard" / "matching")["matching/loss"] for p in (trial, alone))
    assert sorted(two)[:20] == list(range(20))
    for step in range(20):
        assert two[step] == pytest.approx(one[step], rel=1e-4), step
    history = progress(out, "000")[-1]["history"]
    for ours, theirs in zip(history, _history(alone), strict=True):
        assert abs(ours["val"] - theirs["val"]) <= 2 * max(1.0, ours["stderr"] + theirs["stderr"])


def assert_idle(hosts):
    """Ray comes to know that every node is free, and that those lost are gone: it takes some heartbeats."""
    end = time.monotonic() + 60
    while hosts.free() != len(hosts.nodes) and time.monotonic() < end:
        time.sleep(0.2)
    assert hosts.free() == len(hosts.nodes)


def _history(out: Path):
    directory = (out / "matching" / "latest").resolve()
    return json.loads((directory / "contents.json").read_text())["info"]["history"]


def test_a_node_of_three_is_lost_and_another_added_in_mid_search(hosts, tiny, tmp_path):
    argv = [*tiny, "--matching.steps", "60", "--matching.interval", "10", "--checkpoint_seconds", "0"]
    out = tmp_path / "out"
    running = Running(
        out,
        [*argv, "--trials", "9", "--scheduler", "fifo", "--algorithm", "optuna", "--final-seeds", "0"]
        + ["--address", hosts.address],
        ENVIRONMENT,
    )
    lost = hosts.nodes[0]

    def victims() -> list[str]:
        """Trials past their second report, on the node that will be lost."""
        return [name for name in open_trials(out, 3) if nodes_of(out, name)[-1] == lost]

    def busy() -> set[str]:
        """Nodes in the middle of a trial."""
        return {nodes_of(out, name)[-1] for name in open_trials(out)}

    running.until(lambda: busy() == set(hosts.nodes) and bool(victims()))
    moved = victims()
    hosts.lose(lost)
    hosts.nodes = [*hosts.nodes[1:], hosts.add()]
    assert running.wait() == 0, running.text()
    found = outcomes(out)
    assert sorted(found) == [f"{n:03d}" for n in range(9)]
    assert {line["status"] for line in found.values()} == {"finished"}, found
    assert {node for name in found for node in nodes_of(out, name)} == {lost, *hosts.nodes}
    for name in moved:
        assert len(nodes_of(out, name)) == 2
        assert steps(out, name)["matching"]["status"] == "resumed"
    assert_shared(out)


def test_a_node_lost_in_the_shared_steps_is_waited_for_and_they_go_on(hosts, tiny, tmp_path):
    while len(hosts.nodes) > 2:
        hosts.lose(hosts.nodes.pop())
    assert_idle(hosts)
    out = tmp_path / "out"
    argv = [*tiny, "--gan.steps", "150", "--checkpoint_seconds", "0", "--trials", "2", "--final-seeds", "0"]
    running = Running(out, [*argv, "--address", hosts.address, "--ranks-per-trial", "2"], ENVIRONMENT)
    running.until(lambda: any((out / "gan").glob("*.partial/checkpoints/*")))
    hosts.lose(hosts.nodes.pop())
    running.until(lambda: "has room for only 1 of the 2 ranks needed" in running.text())
    hosts.nodes.append(hosts.add())
    assert running.wait() == 0, running.text()
    shared = json.loads((out / "shared" / "steps.json").read_text())["steps"]
    assert shared["gan"]["status"] == "resumed"
    assert sorted(outcomes(out)) == ["000", "001"]
    assert_shared(out)


def test_a_driver_without_the_token_cannot_be_reached(hosts, tiny, tmp_path):
    environment = {**ENVIRONMENT, "RAY_AUTH_TOKEN": "0" * 32}
    said = refused(tmp_path / "out", [*tiny, "--address", hosts.address], environment)
    assert "cannot join the Ray cluster" in said
    assert "RAY_AUTH_TOKEN" in said


def test_more_ranks_than_the_cluster_holds_are_told_at_once(hosts, tiny, tmp_path):
    argv = [*tiny, "--address", hosts.address, "--ranks-per-trial", "4"]
    assert "fewer than --ranks-per-trial 4" in refused(tmp_path / "out", argv, ENVIRONMENT)
