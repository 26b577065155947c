"""Two hosts as two network namespaces: `ray start` on each, trials on both, ranks across them, a host without the shared storage."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from searching import ROOT, assert_shared, outcomes

pytest.importorskip("ray")

pytestmark = [pytest.mark.root, pytest.mark.slow]

NAMES = ("gdd-a", "gdd-b")
ADDRESSES = ("10.213.7.1", "10.213.7.2")
PORT = 6390
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


def search(out: Path, argv: list[str]) -> subprocess.CompletedProcess:
    """The driver, on the first host."""
    command = [
        sys.executable,
        str(ROOT / "tune" / "search.py"),
        "--out",
        str(out),
        "--address",
        f"{ADDRESSES[0]}:{PORT}",
    ]
    return subprocess.run(
        ["ip", "netns", "exec", NAMES[0], *command, *argv],
        capture_output=True, text=True, check=False, timeout=400, env={**os.environ, **ENVIRONMENT},
    )  # fmt: skip


def joined(count: int, timeout: float = 120) -> None:
    """Wait until so many hosts are there."""
    code = f"import ray; ray.init('{ADDRESSES[0]}:{PORT}', logging_level='ERROR'); print(sum(n['Alive'] for n in ray.nodes()))"
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done = subprocess.run(
            ["ip", "netns", "exec", NAMES[0], sys.executable, "-c", code],
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


def test_two_hosts(tiny, tmp_path):
    if not may_make_namespaces():
        pytest.skip("network namespaces cannot be made here")
    shared = tmp_path / "shared"
    shared.mkdir()
    with namespaces():
        running = [ray_start(0, tmp_path)]
        try:
            joined(1)
            running.append(ray_start(1, tmp_path, hide=shared))
            joined(2)
            done = search(shared / "out", [*tiny, "--trials", "4"])
            assert done.returncode == 2, done.stderr
            errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
            assert len(errors) == 1
            assert f"node {ADDRESSES[1]} does not share the storage" in errors[0]
            assert not (shared / "out" / "trials").exists()

            end(running.pop())
            running.append(ray_start(1, tmp_path))
            joined(2)
            done = search(shared / "out", [*tiny, "--trials", "4", "--scheduler", "fifo", "--final-seeds", "0"])
            assert done.returncode == 0, done.stderr
            found = outcomes(shared / "out")
            assert len(found) == 4
            assert {host.partition("#")[0] for line in found.values() for host in line["hosts"]} == set(ADDRESSES)
            assert_shared(shared / "out")

            two = ["--trials", "2", "--ranks-per-trial", "2", "--final-seeds", "0"]
            done = search(shared / "ranks", [*tiny, *two])
            assert done.returncode == 0, done.stderr
            assert {line["status"] for line in outcomes(shared / "ranks").values()} <= {"finished", "stopped"}
        finally:
            for process in reversed(running):
                end(process)
