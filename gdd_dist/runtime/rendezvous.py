"""How ranks find each other: the store that they share, and which rank reports a fault before they have joined."""

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

from gdd_dist.runtime.signals import PeerError, Unreachable
from sharding.errors import UserError

_LATE = "check that all are running, or raise --timeout"
_POLL = 0.002
_A_YEAR = datetime.timedelta(days=365)
_SOON, _LATER = 30.0, 60.0
"""Seconds that rank 0, which hosts the store, and the other ranks try to report a fault from before the rendezvous."""
_AGAIN = datetime.timedelta(seconds=5)
"""Timeout of one attempt to open a second connection to the store, whose host may have exited."""
_RESOLVE = 60.0
"""Seconds to wait until the name of rank 0's host resolves; in a new cluster this takes a while."""
_ECHO = 60.0
"""Seconds that the other ranks wait for rank 0 to report who is missing."""


def meet(rank: int, size: int, timeout: float) -> Any:
    """Return a store for the ranks of this attempt only (torchrun's own store survives a restart).

    Each rank writes a random word; a reply of rank 0 that repeats it belongs to this attempt. No rank returns before all have
    joined, because rank 0, which may host the store, exits when a rank fails before joining. Raises UserError when a rank
    does not join within ``timeout`` seconds, PeerError when one failed.
    """
    store = _store(rank, size, timeout)
    try:
        return dist.PrefixStore(_meet(store, rank, size, timeout), store)
    except dist.DistError as e:  # rank 0 hosted it, and has exited
        raise PeerError("the connection to the store was lost") from e


def second_connection(store: Any) -> Any:
    """Return another connection to the store of `meet`, for another thread, because a waiting thread blocks its connection.

    Raises PeerError if the store's host has exited. The first connection shows that at once; a new one would retry for long.
    """
    store.set_timeout(_AGAIN)  # the copy inherits this timeout
    other = None
    try:
        while other is None:
            store.check(["failed"])
            with suppress(dist.DistError):
                other = store.clone()
    except dist.DistError as e:
        raise PeerError("the connection to the store was lost") from e
    for connection in (store, other):
        connection.set_timeout(_A_YEAR)  # from here on, heartbeats show which rank is lost
    return other


def _meet(store: Any, rank: int, size: int, timeout: float) -> str:
    """Return the name of this attempt after all ranks have joined."""
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
    raise UserError(f"{who} of {size} did not join within {timeout:g} s; {_LATE}")


def _store(rank: int, size: int, timeout: float) -> Any:
    """Return torchrun's store; without torchrun, rank 0 hosts one, and returns after all ranks have connected."""
    _check_address(timeout)
    try:
        return _connect(rank, timeout + (0 if rank == 0 else _ECHO))
    except (dist.DistError, OSError) as e:
        host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        if "EADDRINUSE" in str(e):
            raise Unreachable(f"port {port} of {host} is in use; choose another MASTER_PORT") from e
        if "failed to listen" in str(e):
            raise Unreachable(f"rank 0 may not listen on port {port} of {host}; choose another MASTER_PORT") from e
        kind = UserError if rank == 0 else Unreachable  # rank 0 hosts the store for a while, for ranks that are late
        raise kind(f"{size} ranks did not connect at {host}:{port} within {timeout:g} s; {_LATE}") from e


def _connect(rank: int, limit: float) -> Any:
    """Return the store within ``limit`` seconds. Raises OSError if nobody listens, DistError if it cannot be used."""
    deadline = time.monotonic() + limit
    while rank > 0:  # torch would print its C++ stack each time that rank 0 does not listen yet
        try:
            socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=limit).close()
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)
    store, _, _ = next(iter(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=limit))))
    return store


def _check_address(timeout: float) -> None:
    """Raise Unreachable if MASTER_ADDR and MASTER_PORT are missing or wrong, because torch would retry for ``timeout`` seconds."""
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        cure = "set them to rank 0's host and a free port, or start with torchrun"
        raise Unreachable(f"RANK and WORLD_SIZE are set, but not {' and '.join(missing)}; {cure}")
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not (port.isdecimal() and 0 < int(port) < 65536):
        raise Unreachable(f"MASTER_PORT is {port!r}; set it to the number of a free port of {host}")
    deadline = time.monotonic() + min(timeout, _RESOLVE)
    while True:
        try:
            socket.getaddrinfo(host, int(port))
            return
        except (OSError, UnicodeError) as e:
            if time.monotonic() > deadline:
                cure = "check that it is rank 0's host, or add it to /etc/hosts"
                raise Unreachable(f"MASTER_ADDR {host} does not resolve on this host ({e}); {cure}") from None
        time.sleep(1.0)


def _call(store: Any, word: str, size: int) -> list[int]:
    """Let rank 0 repeat all words it has received; returns the ranks that have not confirmed this."""
    there = [r for r in range(1, size) if store.check([f"hello/{r}"])]
    words = [w.decode() for w in store.multi_get([f"hello/{r}" for r in there])] if there else []
    store.set("session", json.dumps([word, words]))
    answered = {r for r, w in zip(there, words, strict=True) if store.check([f"{word}/{w}"])}
    missing = [r for r in range(1, size) if r not in answered]
    if not missing:
        store.set(f"{word}/met", "")
    return missing


def _answer(store: Any, word: str) -> str:
    """Return the name of the attempt, "" while rank 0 has not repeated this rank's word, or not all ranks have joined."""
    if not store.check(["session"]):
        return ""
    session, words = json.loads(store.get("session"))
    if word not in words:
        return ""
    store.set(f"{session}/{word}", "")
    return str(session) if store.check([f"{session}/met"]) else ""


def failed_early() -> str:
    """Return the key of a fault before the ranks have joined, in this attempt."""
    return f"failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"


def claim_before_joining() -> bool:
    """Return True for the first rank that fails before joining (wrong settings, no data on this host).

    Also True if this rank cannot connect to the store, because no other rank can know of its fault.
    """
    try:
        _check_address(0.0)
        rank = int(os.environ["RANK"])
        store = _connect(rank, _LATER if rank else _SOON)
    except Exception:  # whatever prevents it, the fault that is being reported must not be lost
        return True
    try:
        return bool(store.add(failed_early(), 1) == 1)
    except RuntimeError:  # rank 0 hosted the store; it has reported a fault, and has exited
        return False
