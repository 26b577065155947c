"""Two hosts as two network namespaces: `ray start` on each, trials on both, ranks across them; a host dies, another comes, one lacks
the shared storage.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from searching import ROOT, Running, assert_shared, open_trials, outcomes, progress, refused, search, steps

pytest.importorskip("ray")

pytestmark = [pytest.mark.root, pytest.mark.slow]

NAMES = ("gdd-a", "gdd-b")
ADDRESSES = ("10.213.7.1", "10.213.7.2")
PORT = 6390
DRIVER = ["ip", "netns", "exec", NAMES[0]]
"""What starts the search: on the first host."""
TO_IT = ["--address", f"{ADDRESSES[0]}:{PORT}"]
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "e" * 32,
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONPATH": str(ROOT),
}


def sh(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


def may_make_namespaces() -> bool:
    try:
        sh("ip", "netns", "add", "gdd-try")
        sh("ip", "netns", "del", "gdd-try")
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


@contextmanager
def namespaces():
    """Two namespaces with one address each, joined by a pair of virtual interfaces."""
    try:
        for name in NAMES:
            sh("ip", "netns", "add", name)
            sh("ip", "-n", name, "link", "set", "lo", "up")
        sh(
            "ip",
            "link",
            "add",
            "veth-a",
            "netns",
            NAMES[0],
            "type",
            "veth",
            "peer",
            "name",
            "veth-b",
            "netns",
            NAMES[1],
        )
        for name, address, device in zip(NAMES, ADDRESSES, ("veth-a", "veth-b"), strict=True):
            sh("ip", "-n", name, "address", "add", f"{address}/24", "dev", device)
            sh("ip", "-n", name, "link", "set", device, "up")
            sh("ip", "-n", name, "route", "add", "default", "dev", device)
        yield
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def ray_start(number: int, folder: Path, hide: Path | None = None) -> subprocess.Popen:
    """`ray start --block` on a host of one CPU; ``hide``: a directory that it does not see as the other does."""
    command = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats", "--num-cpus", "1"]
    command += ["--node-ip-address", ADDRESSES[number], "--object-store-memory", "80000000"]
    if number == 0:
        command += ["--head", "--port", str(PORT), "--include-dashboard", "false"]
    else:
        command += ["--address", f"{ADDRESSES[0]}:{PORT}"]
    if hide is not None:
        command = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs none "{hide}" && exec "$@"', "sh", *command]
    with (folder / f"ray-{number}-{time.monotonic_ns()}.log").open("w") as log:
        environment = {**os.environ, **ENVIRONMENT}
        return subprocess.Popen(
            ["ip", "netns", "exec", NAMES[number], *command], stdout=log, stderr=log, env=environment
        )


def joined(count: int, timeout: float = 120) -> None:
    """Wait until so many hosts are there."""
    code = f"import ray; ray.init('{ADDRESSES[0]}:{PORT}', logging_level='ERROR'); print(sum(n['Alive'] for n in ray.nodes()))"
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done = subprocess.run(
            [*DRIVER, sys.executable, "-c", code],
            capture_output=True, text=True, check=False, env={**os.environ, **ENVIRONMENT},
        )  # fmt: skip
        if done.stdout.strip() == str(count):
            return
        time.sleep(1)
    pytest.fail(f"the hosts do not find each other\n{done.stderr}")


def end(process: subprocess.Popen) -> None:
    """SIGTERM to `ray start --block` ends its host's Ray."""
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def power_cut(number: int, ray: subprocess.Popen) -> None:
    """All that runs on a host is gone at once."""
    found = subprocess.run(["ip", "netns", "pids", NAMES[number]], capture_output=True, text=True, check=True)
    for pid in found.stdout.split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    ray.wait(60)


def hosts_of(out: Path, trial: str) -> list[str]:
    """Addresses that a trial has reported from."""
    return [line["host"].partition("#")[0] for line in progress(out, trial) if "host" in line]


def a_host_dies_and_another_comes(out: Path, tiny: list[str], running: list[subprocess.Popen], folder: Path) -> None:
    """Every trial ends, none twice, and what the dead host was at goes on elsewhere."""
    argv = [*tiny, "--matching.steps", "60", "--matching.interval", "10", "--checkpoint_seconds", "0"]
    argv += ["--trials", "5", "--scheduler", "fifo", "--final-seeds", "0"]
    searching = Running(out, [*argv, *TO_IT], ENVIRONMENT, DRIVER)

    def victims() -> list[str]:
        return [name for name in open_trials(out, 3) if hosts_of(out, name)[-1] == ADDRESSES[1]]

    searching.until(lambda: bool(victims()))
    moved = victims()
    power_cut(1, running.pop())
    running.append(ray_start(1, folder))
    assert searching.wait() == 0, searching.text()
    found = outcomes(out)
    assert sorted(found) == [f"{n:03d}" for n in range(5)]
    assert {line["status"] for line in found.values()} == {"finished"}, found
    for name in moved:
        assert len(found[name]["hosts"]) == 2
        assert steps(out, name)["matching"]["status"] == "resumed"
    assert_shared(out)


def test_two_hosts(tiny, tmp_path):
    if not may_make_namespaces():
        pytest.skip("network namespaces cannot be made here")
    shared = tmp_path / "shared"
    shared.mkdir()
    four = [*tiny, *TO_IT, "--trials", "4", "--scheduler", "fifo", "--final-seeds", "0"]
    with namespaces():
        running = [ray_start(0, tmp_path)]
        try:
            joined(1)
            running.append(ray_start(1, tmp_path, hide=shared))
            joined(2)
            said = refused(shared / "out", four, ENVIRONMENT, DRIVER)
            assert f"node {ADDRESSES[1]} does not share the storage" in said
            assert not (shared / "out" / "trials").exists()

            end(running.pop())
            running.append(ray_start(1, tmp_path))
            joined(2)
            search(shared / "out", four, ENVIRONMENT, DRIVER)
            found = outcomes(shared / "out")
            assert len(found) == 4
            assert {host.partition("#")[0] for line in found.values() for host in line["hosts"]} == set(ADDRESSES)
            assert_shared(shared / "out")

            a_host_dies_and_another_comes(shared / "lost", tiny, running, tmp_path)

            joined(2)
            two = ["--trials", "2", "--ranks-per-trial", "2", "--final-seeds", "0"]
            search(shared / "ranks", [*tiny, *TO_IT, *two], ENVIRONMENT, DRIVER)
            assert {line["status"] for line in outcomes(shared / "ranks").values()} <= {"finished", "stopped"}
        finally:
            for process in reversed(running):
                end(process)
