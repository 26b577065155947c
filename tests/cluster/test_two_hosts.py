"""Two hosts: network namespaces with addresses and disks of their own, joined by a virtual cable; torchrun on each."""

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest
import ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.root,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and ip (network namespaces)"
    ),
]


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def two_hosts():
    """Names of two namespaces; host i has the address 10.77.0.(i + 1) on its interface eth0."""
    names = [f"gddtest{os.getpid()}{c}" for c in "ab"]
    cable = [f"gt{os.getpid()}{c}" for c in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
        for i, name in enumerate(names):
            ip("link", "set", cable[i], "netns", name)
            ip("-n", name, "link", "set", cable[i], "name", "eth0")
            ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start(host, home, argv, index):
    """launchers/torchrun_many_nodes.sh on one of two hosts with two ranks each."""
    script = os.path.join(os.path.dirname(__file__), "../../launchers/torchrun_many_nodes.sh")
    env = {
        **os.environ,
        "BIN": os.path.dirname(sys.executable),
        "NODES": "2",
        "RANKS": "2",
        "HEAD": "10.77.0.1:29511",
        "IFACE": "eth0",
        "OUT": "out",
        "RESTARTS": "0",
    }
    home.mkdir(parents=True, exist_ok=True)
    log = (home / f"log-{index}").open("w")
    command = ["ip", "netns", "exec", host, script, *argv]
    return subprocess.Popen(command, cwd=home, env=env, stdout=log, stderr=subprocess.STDOUT)


def generator(out, step, fp):
    return ranks.weights(out / step / fp / "generator.safetensors")


@pytest.mark.parametrize("disks", ["one", "two"])
def test_two_hosts_of_two_ranks_give_the_bits_of_one_of_four(undisturbed, tmp_path, disks):
    homes = [tmp_path / "home"] * 2 if disks == "one" else [tmp_path / "home-0", tmp_path / "home-1"]
    with two_hosts() as hosts:
        jobs = [start(host, homes[i], undisturbed.argv, i) for i, host in enumerate(hosts)]
        try:
            codes = [job.wait(timeout=500) for job in jobs]
        finally:
            for job in jobs:
                job.kill()
    logs = "\n".join((home / f"log-{i}").read_text() for i, home in enumerate(homes))
    assert codes == [0, 0], logs
    assert ("cannot see" in logs) == (disks == "two")
    for step in ("gan", "matching"):
        fp = undisturbed.steps[step]["fingerprint"]
        for home in homes:
            assert generator(home / "out", step, fp) == generator(undisturbed.out, step, fp)
