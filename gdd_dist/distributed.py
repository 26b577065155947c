"""Ranks: who we are, who does what, how we agree. Agreement goes through the rendezvous store as JSON, so ranks that run
apart for minutes never stand in a collective, and nothing is unpickled.
"""

from __future__ import annotations

import ctypes
import datetime
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from sharding.errors import UserError

_POLL = 0.002
_A_YEAR = datetime.timedelta(days=365)
_SOON = datetime.timedelta(seconds=10)


class PeerError(Exception):
    """Another rank failed; its own message says why."""


class World:
    """All ranks of this run. ``size`` 1 without torchrun: then nothing here waits for anybody."""

    def __init__(self, device: str = "auto", timeout: float = 600.0) -> None:
        env = os.environ
        self.rank, self.size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
        self.local_rank = int(env.get("LOCAL_RANK", 0))
        # deepspeed's launcher has a name of its own for it
        self.local_size = int(env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", 1)))
        self.timeout = timeout
        self.device = self._pick_device(device)
        self._store: Any = None
        self._round = 0
        torch.set_num_threads(self.threads)
        if self.size > 1:
            self._store, _, _ = next(iter(dist.rendezvous("env://", timeout=_A_YEAR)))
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            limit = datetime.timedelta(seconds=timeout)
            dist.init_process_group(
                backend, store=dist.PrefixStore("gdd", self._store), rank=self.rank, world_size=self.size, timeout=limit
            )

    def _pick_device(self, device: str) -> torch.device:
        if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
            if not torch.cuda.is_available():
                raise UserError("--device cuda, but torch sees no CUDA device; use --device cpu or mend the driver")
            if self.local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"{self.local_size} ranks on this host but {torch.cuda.device_count()} CUDA devices; "
                    "start one rank per device or use --device cpu"
                )
            torch.cuda.set_device(self.local_rank)
            return torch.device("cuda", self.local_rank)
        return torch.device("cpu")

    @property
    def threads(self) -> int:
        """CPU threads of this rank: its share of the cores it may use; fewer where OMP_NUM_THREADS says so."""
        share = max(1, len(os.sched_getaffinity(0)) // self.local_size)
        asked = os.environ.get("OMP_NUM_THREADS", "")
        if "TORCHELASTIC_RUN_ID" in os.environ or not asked.isdigit() or int(asked) == 0:
            return share  # torchrun sets it to 1 where the user has not, which says nothing of what he wants
        return min(share, int(asked))

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0

    def gather(self, value: Any = None) -> list[Any]:
        """Every rank's ``value`` (anything JSON holds), in rank order, on every rank. Also a barrier."""
        if self.size == 1:
            return [value]
        self._round += 1
        key = f"gather/{self._round}"
        self._store.set(f"{key}/{self.rank}", json.dumps(value))
        if self.is_main:
            everything = [json.loads(self._wait(f"{key}/{r}")) for r in range(self.size)]
            self._store.set(key, json.dumps(everything))
        result: list[Any] = json.loads(self._wait(key))
        self._store.delete_key(f"{key}/{self.rank}")
        return result

    def _wait(self, key: str) -> bytes:
        """Poll, so that a peer's failure is seen at once and a busy peer may take as long as it needs."""
        wait = _POLL
        while not self._store.check([key]):
            self._check_peers()
            time.sleep(wait)
            wait = min(wait * 1.5, 0.1)
        value: bytes = self._store.get(key)
        return value

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.gather()

    def broadcast(self, value: Any = None) -> Any:
        """Rank 0's ``value`` (anything JSON holds), on every rank."""
        return self.gather(value if self.is_main else None)[0]

    def sum(self, value: int) -> int:
        """The sum of ``value`` over ranks."""
        return int(sum(self.gather(value)))

    def queue(self, jobs: int) -> Iterator[int]:
        """Job numbers 0 … jobs - 1, each given to exactly one rank, to whoever is free next. All ranks must call it alike."""
        self._round += 1
        key, n = f"queue/{self._round}", 0
        while True:
            taken = n if self.size == 1 else self._store.add(key, 1) - 1
            n += 1
            if taken >= jobs:
                return
            self._check_peers()
            yield taken

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on any rank (an all-reduce: for use inside steps)."""
        if self.size == 1:
            return flag
        t = torch.tensor([int(flag)])
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return bool(t.item())

    def mean(self, values: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """The means over ranks of scalar tensors (one all-reduce, which all ranks must join)."""
        stacked = torch.stack([v.detach().float() for v in values.values()])
        if self.size > 1:
            dist.all_reduce(stacked)
            stacked /= self.size
        return dict(zip(values, stacked.tolist(), strict=True))

    def failed(self) -> bool:
        """Whether a rank has failed, or the store's host is gone."""
        try:
            return self._store is not None and bool(self._store.check(["failed"]))
        except RuntimeError:
            return True

    def _check_peers(self) -> None:
        if self.failed():
            raise PeerError("another rank failed")

    def claim_failure(self) -> bool:
        """True for the first rank that fails: it reports; all others only say that they stopped."""
        if self._store is None:
            return True
        try:
            return bool(self._store.add("failed", 1) == 1)
        except RuntimeError:  # the store's host is gone: somebody else has failed before us
            return False

    def close(self) -> None:
        """Leave together: barrier, then destroy the group (gloo aborts at exit otherwise, now and then)."""
        if self.size > 1:
            self.barrier()
            dist.destroy_process_group()
            self._leave_store()

    def _leave_store(self) -> None:
        """Rank 0 goes last: without torchrun it hosts the store, which others still read in that last barrier."""
        deadline = time.monotonic() + self.timeout
        here = self._store.add("left", 0 if self.is_main else 1)
        while self.is_main and here < self.size - 1 and time.monotonic() < deadline:
            time.sleep(_POLL)
            here = self._store.add("left", 0)


def claim_before_joining() -> bool:
    """True for the first of the ranks that fail before they join the others (wrong settings, no data on this host)."""
    try:
        store, _, _ = next(iter(dist.rendezvous("env://", timeout=_SOON)))
        return bool(store.add("failed", 1) == 1)
    except (RuntimeError, ValueError):  # no store within reach
        return int(os.environ.get("RANK", 0)) == 0


def end_with(status: int) -> NoReturn:
    """Leave at once: no interpreter teardown in which gloo's threads could abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def stop_with_parent(rank: int) -> None:
    """End this rank with its torchrun: on its SIGTERM, which it sends when another rank died, and when it is gone itself.

    torchrun starts each rank in a session of its own, so killing its process group does not reach the ranks.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return

    # A handler waits while the main thread is inside a collective, and torchrun kills after 30 s: so a thread listens.
    told, tell = os.pipe()
    os.set_blocking(tell, False)

    def listen() -> None:
        while os.read(told, 1)[0] != signal.SIGTERM:
            pass
        os.write(2, f"stopped: rank {rank} ended by SIGTERM\n".encode())
        os._exit(143)

    threading.Thread(target=listen, daemon=True).start()
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda _signal, _frame: None)
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() == 1:
            end_with(143)
