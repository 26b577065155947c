"""How ranks meet: the store that they share, and which of them reports a fault from before the meeting."""

from __future__ import annotations

import datetime
import json
import os
import socket
import time
import uuid
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from gdd_dist.runtime.signals import PeerError
from sharding.errors import UserError

_POLL = 0.002
_A_YEAR = datetime.timedelta(days=365)
_SOON, _LATER = datetime.timedelta(seconds=30), datetime.timedelta(seconds=120)
"""How long rank 0, which hosts the store, and the others try to tell of a fault that came before they met."""
_AGAIN = datetime.timedelta(seconds=5)
"""How long one try to reach the store a second time takes, where its host may have left since."""
_RESOLVE = 60.0
"""Seconds within which the name of rank 0's host must come to resolve: in a new cluster it does so late."""
_ECHO = 60.0
"""Seconds that the others give rank 0 to say who is missing."""


def meet(rank: int, size: int, timeout: float) -> Any:
    """A store that the ranks of this attempt share, and none of an attempt before it (torchrun's own outlives a restart).

    Each rank says a fresh word; what rank 0 says is of this attempt if it repeats that word. Nobody leaves the meeting before
    all are there: rank 0, which may host the store, leaves the job when a rank fails that has not come. Raises UserError
    when one does not come within ``timeout`` seconds, PeerError when one failed.
    """
    store = _store(rank, size, timeout)
    try:
        return dist.PrefixStore(_meet(store, rank, size, timeout), store)
    except dist.DistError as e:  # rank 0 hosted it, and has left
        raise PeerError("the store is gone") from e


def second_connection(store: Any) -> Any:
    """Another connection to the store that `meet` returned, for a thread of its own: one that waits holds its connection.

    Raises PeerError where the store's host has left. The first connection tells that at once, a new one would be tried for long.
    """
    store.set_timeout(_AGAIN)  # its copy takes this over
    other = None
    try:
        while other is None:
            store.check(["failed"])
            with suppress(dist.DistError):
                other = store.clone()
    except dist.DistError as e:
        raise PeerError("the store is gone") from e
    for connection in (store, other):
        connection.set_timeout(_A_YEAR)  # from here on it is heartbeats that tell who is gone
    return other


def _meet(store: Any, rank: int, size: int, timeout: float) -> str:
    """The name of this attempt, once all ranks are there."""
    word, wait = uuid.uuid4().hex[:16], _POLL
    deadline = time.monotonic() + timeout + (0 if rank == 0 else _ECHO)
    store.set(f"hello/{rank}", word)
    missing = [0]
    while time.monotonic() < deadline:
        if rank == 0:
            missing = _call(store, word, size)
            session = word
        else:
            session = _answer(store, word)
            missing = [] if session else [0]
        if not missing:
            return session
        if store.check([failed_early()]):
            raise PeerError("another rank failed")
        time.sleep(wait)
        wait = min(wait * 1.5, 0.1)
    who = "rank " + ", ".join(map(str, missing))
    raise UserError(f"{who} of {size} did not come within {timeout:g} s; see that all are started, or raise --timeout")


def _store(rank: int, size: int, timeout: float) -> Any:
    """torchrun's store; without torchrun rank 0 hosts one, and does not return before all have reached it."""
    limit = datetime.timedelta(seconds=timeout + (0 if rank == 0 else _ECHO))
    _check_address(timeout)
    try:
        store, _, _ = next(iter(dist.rendezvous("env://", timeout=limit)))
    except dist.DistError as e:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        why = "see that all are started, or raise --timeout"
        raise UserError(f"{size} ranks did not meet at {where} within {timeout:g} s; {why}") from e
    return store


def _check_address(timeout: float) -> None:
    """Raise UserError where MASTER_ADDR and MASTER_PORT are not set or lead nowhere: torch would try for ``timeout`` seconds."""
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        cure = "set them to rank 0's host and a free port, or start with torchrun"
        raise UserError(f"RANK and WORLD_SIZE are set but {' and '.join(missing)} not; {cure}")
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not (port.isdigit() and 0 < int(port) < 65536):
        raise UserError(f"MASTER_PORT is {port!r}; set it to the number of a free port of {host}")
    deadline = time.monotonic() + min(timeout, _RESOLVE)
    while True:
        try:
            socket.getaddrinfo(host, int(port))
            return
        except (OSError, UnicodeError) as e:
            if time.monotonic() > deadline:
                cure = "see that it is rank 0's host, or add it to /etc/hosts"
                raise UserError(f"MASTER_ADDR {host} does not resolve on this host ({e}); {cure}") from None
        time.sleep(1.0)


def _call(store: Any, word: str, size: int) -> list[int]:
    """Rank 0 repeats all words it hears; returns the ranks that have not answered to it."""
    there = [r for r in range(1, size) if store.check([f"hello/{r}"])]
    words = [w.decode() for w in store.multi_get([f"hello/{r}" for r in there])] if there else []
    store.set("session", json.dumps([word, words]))
    answered = {r for r, w in zip(there, words, strict=True) if store.check([f"{word}/{w}"])}
    missing = [r for r in range(1, size) if r not in answered]
    if not missing:
        store.set(f"{word}/met", "")
    return missing


def _answer(store: Any, word: str) -> str:
    """The name of the attempt, "" while rank 0 has not repeated this rank's word or has not heard of all ranks."""
    if not store.check(["session"]):
        return ""
    session, words = json.loads(store.get("session"))
    if word not in words:
        return ""
    store.set(f"{session}/{word}", "")
    return str(session) if store.check([f"{session}/met"]) else ""


def failed_early() -> str:
    """The key of a fault before the ranks have met, in this attempt."""
    return f"failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"


def claim_before_joining() -> bool:
    """True for the first of the ranks that fail before they join the others (wrong settings, no data on this host)."""
    try:
        _check_address(0.0)
        limit = _SOON if os.environ.get("RANK", "0") == "0" else _LATER
        store, _, _ = next(iter(dist.rendezvous("env://", timeout=limit)))
        return bool(store.add(failed_early(), 1) == 1)
    except (RuntimeError, UserError):  # no store within reach
        return os.environ.get("RANK", "0") == "0"
