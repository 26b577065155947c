"""Starts Ray on this host or connects to a cluster, and checks before any trial whether it can do what is asked."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gdd_dist.data.location import is_remote, read_manifest
from gdd_dist.runtime.monitor import say
from gdd_dist.runtime.versions import versions
from sharding.errors import UserError
from tune.arguments import Options
from tune.environment import python_path, token_is_known
from tune.space import counted

REACH_SECONDS = 5.0
PROBE_SECONDS = 120.0
LONGEST_PLACE = 107 - len("/gdd-ray-12345678/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")
"""Bytes; a socket's path may have 107."""
OBJECT_STORE = 100_000_000
"""Bytes of Ray's object store on this host, through which only settings and accuracies go."""


@dataclass(frozen=True)
class Node:
    """A host of the cluster, with all its CPUs and GPUs."""

    id: str
    host: str
    cpus: float
    gpus: float

    def slots(self, cpus: float, gpus: float) -> int:
        """Return how many ranks of ``cpus`` CPUs and ``gpus`` GPUs fit."""
        fits = [self.cpus / cpus] + ([self.gpus / gpus] if gpus else [])
        return int(min(fits) + 1e-9)


@contextmanager
def cluster(address: str | None, debug: bool = False) -> Iterator[list[Node]]:
    """Connect to a running cluster, or run a local Ray (``address`` None) inside the context. ``debug``: show the workers' output."""
    files = tempfile.mkdtemp(prefix="gdd-ray-", dir=temporary()) if address is None else None
    try:
        _start(address, files, debug)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has put a handler of its own there
        yield nodes()
    finally:
        ray.shutdown()
        if files is not None and debug:
            say(f"search: Ray's logs are in {files}")
        elif files is not None:
            shutil.rmtree(files, ignore_errors=True)


def _start(address: str | None, files: str | None, debug: bool) -> None:
    quiet: dict[str, Any] = {"log_to_driver": debug, "logging_level": "ERROR"}
    if address is None:
        cores = int(this_host().cpus)
        own: dict[str, Any] = {"num_cpus": cores, "object_store_memory": OBJECT_STORE, "_temp_dir": files}
        # A batch system sends SIGTERM to the whole process group. Without its own processes, Ray would wait a minute, and then end this one.
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            ray.init(address="local", include_dashboard=False, **own, **quiet)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, heard)
        return
    try:
        ray.init(address=address, runtime_env={"env_vars": {"PYTHONPATH": python_path()}}, **quiet)
    except (ConnectionError, RuntimeError, ValueError, RayError) as e:
        raise UserError(f"cannot join the Ray cluster at {address} ({_short(e)}); {_remedy(address)}") from e


def _remedy(address: str) -> str:
    """Return advice that includes the token, because Ray does not say when it refuses one."""
    token = "give its token in RAY_AUTH_TOKEN or ~/.ray/auth_token, or set RAY_AUTH_MODE=disabled if it asks for none"
    return f"start one with `ray start --head`, or {token}" if address == "auto" else token


def temporary() -> str:
    """Return where a local Ray keeps its files: not TMPDIR, since a socket's path must be short. Raises UserError if Ray cannot use it."""
    place = os.environ.get("RAY_TMPDIR") or "/tmp"
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{place} is not a directory that Ray can write to; set RAY_TMPDIR to another one")
    if len(os.fsencode(place)) > LONGEST_PLACE:
        cure = f"set RAY_TMPDIR to one of {LONGEST_PLACE} bytes or fewer, such as /tmp"
        raise UserError(f"the path {place} is too long for Ray's sockets; {cure}")
    return place


def check_address(address: str | None) -> None:
    """Raise UserError for a cluster that cannot be joined; Ray itself would wait long, or end the process, when nobody answers."""
    if address is None:
        return
    if address != "auto":
        host, _, port = address.rpartition(":")
        if "://" in address or not host or not port.isdigit():
            raise UserError(f"--address {address} is not the address of a cluster; give HOST:PORT of its head, or auto")
        try:
            socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()
        except (OSError, OverflowError) as e:
            cure = "start it with `ray start --head`, or leave out --address"
            raise UserError(f"no Ray cluster answers at {address} ({e}); {cure}") from e
    if not token_is_known():
        raise UserError(f"no token for the Ray cluster at {address}; {_remedy(address)}")


def nodes() -> list[Node]:
    """Return the hosts that are alive."""
    alive = [(n, n["Resources"]) for n in ray.nodes() if n["Alive"]]
    return [Node(n["NodeID"], n["NodeManagerAddress"], r.get("CPU", 0.0), r.get("GPU", 0.0)) for n, r in alive]


def gpus_of(o: Options, found: Sequence[Node]) -> float:
    """Return the GPUs of a rank: as many as asked for, else one if the cluster has any."""
    return o.gpus_per_trial if o.gpus_per_trial is not None else float(any(n.gpus >= 1 for n in found))


def this_host() -> Node:
    """Return this host as a local Ray will offer it."""
    return Node("", "this host", float(len(os.sched_getaffinity(0))), float(torch.cuda.device_count()))


def ranks_held(o: Options) -> int:
    """Return how many ranks fit at a time, as the cluster is now."""
    found = nodes()
    return sum(n.slots(o.cpus_per_trial, gpus_of(o, found)) for n in found)


def room(o: Options) -> int:
    """Return how many trials fit at a time, as the cluster is now, up to --max-concurrent."""
    fits = ranks_held(o) // o.ranks_per_trial
    return min(fits, o.max_concurrent) if o.max_concurrent else fits


class Shrunk:
    """A function to call often: it tells the user when fewer than ``ranks`` ranks fit, because nothing continues until nodes join."""

    def __init__(self, o: Options, ranks: int) -> None:
        self._options, self._ranks, self._told = o, ranks, False

    def __call__(self) -> None:
        """Tell it once each time it happens."""
        held = ranks_held(self._options)
        if held < self._ranks and not self._told:
            then = "the search continues when nodes join, or after Ctrl-C with --resume and fewer ranks"
            say(f"search: the cluster has room for only {held} of the {self._ranks} ranks needed; {then}")
        self._told = held < self._ranks


def check_resources(o: Options, found: Sequence[Node]) -> int:
    """Return how many ranks fit at a time. Raises UserError when not even one trial fits, instead of waiting for ever."""
    gpus = gpus_of(o, found)
    per_node = [n.slots(o.cpus_per_trial, gpus) for n in found]
    wanted = f"{o.cpus_per_trial:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
    if not any(per_node):
        most = ", ".join(f"{n.host}: {n.cpus:g} CPUs, {n.gpus:g} GPUs" for n in found) or "no node is alive"
        cure = "lower --cpus-per-trial or --gpus-per-trial, or add nodes"
        raise UserError(f"no node has the {wanted} of a rank ({most}); {cure}")
    if sum(per_node) < o.ranks_per_trial:
        fewer = f"fewer than --ranks-per-trial {o.ranks_per_trial}"
        raise UserError(f"the cluster has room for {sum(per_node)} ranks of {wanted}, {fewer}; lower it, or add nodes")
    return sum(per_node)


def _probe(out: str, data: str, token: str) -> dict[str, str]:
    """Run on a node: return what it reads in the shared directories, and its versions."""
    seen = Path(out, f".storage-check-{token}").read_text()
    Path(out, f".storage-check-{token}-{ray.get_runtime_context().get_node_id()}").write_text(seen)
    return {"token": seen, "data": read_manifest(data).fingerprint, **versions()}


def check_nodes(found: Sequence[Node], out: Path, data: str) -> None:
    """Raise UserError naming a node that does not see OUT and DATA (a directory or URL) as the driver does, or runs other code."""
    token = secrets.token_hex(8)
    marker = out / f".storage-check-{token}"
    marker.write_text(token)
    here = {"token": token, "data": read_manifest(data).fingerprint, **versions()}
    probe = ray.remote(num_cpus=0, max_retries=0)(_probe)
    try:
        places = {n: NodeAffinitySchedulingStrategy(n.id, soft=False) for n in found}
        asked = {n: probe.options(scheduling_strategy=at).remote(str(out), data, token) for n, at in places.items()}
        for node, answer in asked.items():
            _check_answer(node, answer, here, out, data)
            if not (out / f".storage-check-{token}-{node.id}").exists():
                what = f"files that node {node.host} writes to {out} do not appear on this host"
                raise UserError(f"{what}; mount the same storage on all nodes")
    finally:
        for path in out.glob(f".storage-check-{token}*"):
            path.unlink(missing_ok=True)


def _check_answer(node: Node, answer: ray.ObjectRef, here: dict[str, str], out: Path, data: str) -> None:
    try:
        there = ray.get(answer, timeout=PROBE_SECONDS)
    except ray.exceptions.GetTimeoutError as e:
        raise UserError(f"node {node.host} does not respond; check it with `ray status`, or remove it") from e
    except ray.exceptions.RayTaskError as e:
        cause = e.cause if isinstance(getattr(e, "cause", None), Exception) else e
        raise UserError(_unfit(node, cause, out, data)) from e
    except RayError as e:
        raise UserError(f"node {node.host} cannot run a trial ({_short(e)}); check its logs, or remove it") from e
    for name, value in here.items():
        if there.get(name) != value:
            what = f"node {node.host} has {name} {there.get(name)} instead of {value}"
            raise UserError(f"{what}; make the versions equal")


def _unfit(node: Node, cause: Exception, out: Path, data: str) -> str:
    """Return what is wrong with a node, by the error of its probe."""
    mount = "mount it there at the same path"
    if isinstance(cause, OSError):
        return f"node {node.host} does not share the storage of {out} ({_short(cause)}); {mount}"
    if isinstance(cause, UserError):
        remedy = "give it network access and credentials" if is_remote(data) else mount
        return f"node {node.host} does not see the data ({_short(cause)}); {remedy}"
    return f"node {node.host} cannot run a trial ({_short(cause)}); install the same gdd_dist there"


def _short(fault: Exception) -> str:
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
    return (lines[-1] if lines else type(fault).__name__)[:200]


def describe(found: Sequence[Node], ranks: int) -> None:
    """Tell the user the size of the cluster in one line."""
    cpus, gpus = sum(n.cpus for n in found), sum(n.gpus for n in found)
    where = f"{counted(len(found), 'node')}, {cpus:g} CPUs, {gpus:g} GPUs"
    say(f"search: Ray {ray.__version__} on {where}; room for {counted(ranks, 'rank')} at a time")
