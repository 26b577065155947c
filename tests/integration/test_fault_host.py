"""Two "hosts" (network namespaces), two ranks each: one dies and comes back, or is cut off without a word."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import ranks
from test_torchrun import LONG_GAN, steps_done, wait_for

pytestmark = [pytest.mark.root, pytest.mark.slow]
FIRST, SECOND = "10.77.0.1", "10.77.0.2"


def ip(*args):
    subprocess.run(["ip", *args], check=True)


class Host:
    """A network namespace on a virtual cable; ``run`` starts torchrun there."""

    def __init__(self, name, address):
        self.name, self.address, self.jobs = name, address, []

    def run(self, log, argv, elastic):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2", *elastic]
        meet = ["--rdzv_backend=c10d", f"--rdzv_endpoint={FIRST}:29577", f"--local-addr={self.address}"]
        host = ["--rdzv_conf", f"is_host={int(self.address == FIRST)}"]
        env = {**os.environ, "GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1"}
        if elastic:  # as launchers/torchrun_many_nodes.sh has it
            env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        with log.open("w") as stream:
            job = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command, *meet, *host, "-m", "gdd_dist.train", *argv],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=env,
            )
        self.jobs.append(job)
        return job

    def die(self):
        """Every process of the host, at once."""
        pids = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True).stdout
        for pid in pids.split():
            os.kill(int(pid), signal.SIGKILL)
        for job in self.jobs:
            job.wait()


@pytest.fixture
def hosts():
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("needs root and ip: makes network namespaces")
    tag = f"gdd{os.getpid()}"
    with namespace(f"{tag}a") as a, namespace(f"{tag}b") as b:
        ip("link", "add", "cable", "netns", a, "type", "veth", "peer", "name", "cable", "netns", b)
        pair = Host(a, FIRST), Host(b, SECOND)
        for host in pair:
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "cable")
            ip("-n", host.name, "link", "set", "cable", "up")
        try:
            yield pair
        finally:
            for host in pair:
                host.die()


@contextmanager
def namespace(name):
    ip("netns", "add", name)
    try:
        ip("-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        ip("netns", "del", name)


@pytest.fixture(scope="module")
def whole(undisturbed, tmp_path_factory):
    """The gan of an undisturbed run on one host: its directory."""
    out = undisturbed.copy(tmp_path_factory.mktemp("whole") / "out", "teachers", "logits")
    return out / "gan" / ranks.train(out, [*undisturbed.argv, *LONG_GAN], 4)["gan"]["fingerprint"]


def assert_resumed_to(whole, out):
    found = ranks.steps(out)["gan"]
    assert (found["status"], found["fingerprint"]) == ("resumed", whole.name)
    for name in ("generator.safetensors", "discriminator-state.pt"):
        assert ranks.weights(whole / name) == ranks.weights(out / "gan" / whole.name / name)


def assert_names_ranks_2_and_3(log):
    errors = [line for line in log.read_text().splitlines() if line.startswith("error:")]
    assert len(errors) == 1, log.read_text()
    assert "rank 2 (process " in errors[0]
    assert "rank 3 (process " in errors[0]
    assert "in step gan) is gone; run the same command again" in errors[0]


def test_a_host_that_dies_ends_the_job_and_when_it_is_back_the_job_goes_on_to_the_same_weights(
    undisturbed, whole, hosts, tmp_path
):
    out = undisturbed.copy(tmp_path / "out", "teachers", "logits")
    argv, logs = [*undisturbed.argv, *LONG_GAN, "--out", str(out)], [tmp_path / "first.log", tmp_path / "second.log"]
    left = hosts[0].run(logs[0], argv, [])
    hosts[1].run(logs[1], argv, [])
    wait_for(lambda: steps_done(out) >= 10)
    hosts[1].die()
    begin = time.monotonic()
    assert left.wait(240) == 1
    print(f"the other host's part of the job ended after {time.monotonic() - begin:.0f} s")
    assert_names_ranks_2_and_3(logs[0])

    jobs = [host.run(log, argv, []) for host, log in zip(hosts, logs, strict=True)]
    for job in jobs:
        assert job.wait(300) == 0, "\n".join(log.read_text() for log in logs)
    assert_resumed_to(whole, out)


def test_with_max_restarts_the_host_that_is_left_waits_for_the_one_that_died_and_both_go_on(
    undisturbed, whole, hosts, tmp_path
):
    """Nobody starts anything anew on the first host; on the second its system does, when it is up again."""
    out = undisturbed.copy(tmp_path / "out", "teachers", "logits")
    argv, logs = [*undisturbed.argv, *LONG_GAN, "--out", str(out)], [tmp_path / "first.log", tmp_path / "second.log"]
    elastic = ["--max-restarts=2"]
    left = hosts[0].run(logs[0], argv, elastic)
    hosts[1].run(logs[1], argv, elastic)
    wait_for(lambda: steps_done(out) >= 10)
    hosts[1].die()
    wait_for(lambda: "is gone; run the same command again" in logs[0].read_text(), timeout=240)
    back = hosts[1].run(tmp_path / "back.log", argv, elastic)
    text = [*logs, tmp_path / "back.log"]
    assert [left.wait(300), back.wait(240)] == [0, 0], "\n".join(log.read_text() for log in text)
    assert_names_ranks_2_and_3(logs[0])
    assert_resumed_to(whole, out)


def test_a_host_that_is_cut_off_without_a_word_is_missed_by_the_others(undisturbed, hosts, tmp_path):
    out = undisturbed.copy(tmp_path / "out", "teachers", "logits")
    argv = [*undisturbed.argv, "--until", "gan", "--gan.steps", "5000", "--timeout", "6", "--out", str(out)]
    logs = [tmp_path / f"{host.name}.log" for host in hosts]
    jobs = [host.run(log, argv, []) for host, log in zip(hosts, logs, strict=True)]
    wait_for(lambda: steps_done(out) >= 10)
    ip("-n", hosts[1].name, "link", "set", "cable", "down")
    ranks_of = [
        subprocess.run(["ip", "netns", "pids", h.name], capture_output=True, text=True, check=True) for h in hosts
    ]
    assert all(len(r.stdout.split()) >= 3 for r in ranks_of)
    wait_for(
        lambda: all(any("error: rank" in line for line in log.read_text().splitlines()) for log in logs), timeout=120
    )
    errors = [[line for line in log.read_text().splitlines() if line.startswith("error:")] for log in logs]
    assert [len(e) for e in errors] == [1, 1], errors
    assert "has sent no heartbeat for 6 s" in errors[0][0]
    assert "in step gan" in errors[0][0]
    assert f"has not reached {FIRST} for 6 s in step gan" in errors[1][0]
    assert all(job.poll() is None or job.returncode for job in jobs)
