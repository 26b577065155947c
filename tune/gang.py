"""The trainer's own steps inside Ray: rank 0 is the process that calls, the other ranks are actors in its placement group. They end
with it, whatever ends it, so a trial that a scheduler stops leaves nothing behind.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from gdd_dist.config.settings import Config
from gdd_dist.pipeline.dataset import data_directory
from gdd_dist.pipeline.run import run as run_steps
from gdd_dist.runtime.monitor import say
from gdd_dist.runtime.world import World
from gdd_dist.storage.store import read_records
from gdd_dist.training.context import OnInterval
from sharding.errors import UserError

_LAST_WORDS = 10.0
"""Seconds that rank 0 gets to end by itself after a peer is gone."""


@dataclass(frozen=True)
class Job:
    """A run of the trainer. ``config``: with data, out, store and until; ``cpus``, ``gpus``: of each rank."""

    config: Config
    preset: str
    ranks: int
    cpus: float
    gpus: float

    @property
    def out(self) -> Path:
        """Return the job's run directory."""
        return Path(str(self.config.out))

    def bundles(self) -> list[dict[str, float]]:
        """Return what Ray reserves: CPUs and GPUs of each rank."""
        one = {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})
        return [one] * self.ranks


class PeerLost(Exception):
    """A rank's process or node is gone; the job may continue from its checkpoint elsewhere."""


class Peer:
    """A rank other than 0."""

    def host(self) -> tuple[str, str]:
        """Return (node id, address) of its node."""
        return here()

    def run(self, job: Job, place: Mapping[str, str]) -> None:
        """Run the whole job as the rank that ``place`` says."""
        run_rank(job, place)


def here() -> tuple[str, str]:
    """Return (node id, address) of this process's node."""
    return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()


def run(job: Job, on_interval: OnInterval | None = None) -> dict[str, Any]:
    """Run the job with this process as rank 0; return its steps.json. Raises what the trainer raises, PeerLost when a peer is gone."""
    if job.ranks == 1:
        run_rank(job, places([here()], 0)[0], on_interval)
        return read_records(job.out)
    group: Any = ray.util.get_current_placement_group()
    rank: Any = ray.remote(num_cpus=job.cpus, num_gpus=job.gpus)(Peer)
    spots = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i) for i in range(1, job.ranks)]
    peers = [rank.options(scheduling_strategy=spot).remote() for spot in spots]
    over = threading.Event()
    try:
        with socket.socket() as s:
            s.bind(("", 0))
            port = int(s.getsockname()[1])
        found = places([here(), *ray.get([p.host.remote() for p in peers])], port)
        running = [p.run.remote(job, place) for p, place in zip(peers, found[1:], strict=True)]
        threading.Thread(target=_watch, args=(running, over), daemon=True).start()
        _lead(job, found[0], running, on_interval)
    except RayActorError as e:
        raise PeerLost(f"a rank was lost ({' '.join(str(e).split())[:200]})") from e
    finally:
        over.set()
        for peer in peers:
            ray.kill(peer)
    return read_records(job.out)


def _lead(job: Job, place: Mapping[str, str], running: Sequence[ray.ObjectRef], on_interval: OnInterval | None) -> None:
    """Run rank 0's part; if a peer has failed, raise its fault, which caused the one here."""
    try:
        run_rank(job, place, on_interval)
    except Exception:
        ray.wait(list(running), num_returns=1, timeout=_LAST_WORDS)
        ended, _ = ray.wait(list(running), num_returns=len(running), timeout=0)
        for answer in ended:
            try:
                ray.get(answer)
            except RayTaskError as e:
                raise (e.cause if isinstance(e.cause, Exception) else e) from e
        raise
    ray.get(list(running))


def _watch(running: Sequence[ray.ObjectRef], over: threading.Event) -> None:
    """End this process when a peer is gone and rank 0 still waits for it, for example in a collective."""
    waiting = list(running)
    while waiting:
        ended, waiting = ray.wait(waiting, num_returns=1)
        try:
            ray.get(ended)
        except Exception as e:
            if not over.wait(2 * _LAST_WORDS):
                say(f"search: a rank failed and rank 0 does not respond: {' '.join(str(e).split())[:500]}")
                os._exit(1)
            return


def run_rank(job: Job, place: Mapping[str, str], on_interval: OnInterval | None = None) -> None:
    """Run all steps of the job as one rank."""
    os.environ.update(place)
    if job.gpus:
        os.environ["LOCAL_RANK"] = "0"  # Ray shows each process its own GPUs alone
    if job.ranks > 1 and (name := interface(here()[1])):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)  # the host's name may lead elsewhere than Ray's address does
    world = World(job.config.device, job.config.timeout, job.config.deterministic).join()
    world.local_rank = int(place["LOCAL_RANK"])
    data = data_directory(job.config)
    assert data is not None
    run_steps(world, job.config, job.preset, data, job.out, on_interval=on_interval)
    world.close()


def places(hosts: Sequence[tuple[str, str]], port: int) -> list[dict[str, str]]:
    """Return each rank's environment, as torchrun would set it; ``hosts``: (node id, address) by rank."""
    names = [node for node, _ in hosts]
    return [
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(hosts)),
            "LOCAL_RANK": str(names[:rank].count(node)),
            "LOCAL_WORLD_SIZE": str(names.count(node)),
            "MASTER_ADDR": hosts[0][1],
            "MASTER_PORT": str(port),
        }
        for rank, node in enumerate(names)
    ]


def interface(address: str) -> str | None:
    """Return the network interface that has this IPv4 address, None if it is another host's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                siocgifaddr = 0x8915
                answer = fcntl.ioctl(s.fileno(), siocgifaddr, struct.pack("256s", name[:15].encode()))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def submit(job: Job) -> tuple[ray.ObjectRef, Any]:
    """Start a job in its own placement group; return (its future steps.json, the group). Ray repeats it if a node is lost."""
    group = ray.util.placement_group(job.bundles(), strategy="PACK")
    retried: Any = [PeerLost]
    place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
    task = ray.remote(max_retries=3, retry_exceptions=retried, max_calls=1)(run)
    options = {"num_cpus": job.cpus, "num_gpus": job.gpus, "scheduling_strategy": place}
    return task.options(**options).remote(job), group


def run_all(jobs: Sequence[Job], meanwhile: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
    """Run jobs, as many at a time as fit; return their steps.json. ``meanwhile`` is called every second. Raises the first job's fault."""
    groups = dict(submit(job) for job in jobs)
    answers = list(groups)
    try:
        while groups:
            ended, _ = ray.wait(list(groups), num_returns=1, timeout=1.0)
            meanwhile()
            ray.get(ended)
            for answer in ended:  # at once: the next job may wait for its room
                ray.util.remove_placement_group(groups.pop(answer))
        return ray.get(answers)
    except RayError as e:
        cause = e.cause if isinstance(e, RayTaskError) and isinstance(e.cause, Exception) else e
        if isinstance(e, RayTaskError) and not isinstance(cause, PeerLost):
            raise cause from e
        what = f"a job was lost too often ({' '.join(str(cause).split())[:200]})"
        raise UserError(f"{what}; repair its node, then continue with --resume from its checkpoint") from e
    finally:
        for answer, group in groups.items():
            ray.cancel(answer, force=True)
            ray.util.remove_placement_group(group)


def with_ranks(config: Config, ranks: int) -> int:
    """Return the largest number of ranks, up to ``ranks``, among which the batches of gan and matching can be divided."""
    streams, groups = config.streams("gan"), config.matching.batch // config.matching.group
    return max(n for n in range(1, ranks + 1) if streams % n == 0 and groups % n == 0)


def on_cpu(config: Config, gpus: float) -> Config:
    """Return ``config`` for ranks with ``gpus`` GPUs each: without any they stay on the CPU, even if the host has GPUs."""
    return config if gpus else dataclasses.replace(config, device="cpu")
