"""Exact save and resume inside a step: the last few checkpoints, each verified before it is trusted.

A checkpoint is step-NNN.pt, and a record step-NNN.json with its size and sha256, which is written when the data is durable. No
file lists all checkpoints, so damage to a file costs only one checkpoint.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gdd_dist.storage.checkpoint_records import records, step_of
from gdd_dist.storage.json_files import read_json, write_json
from sharding.errors import UserError
from sharding.files import write_atomic

FORMAT = "gdd-checkpoint/1"


class Checkpoints:
    """Checkpoints of one training loop in ``directory``, every ``seconds``, or less often so that saving costs ≤ 3 %."""

    def __init__(
        self,
        directory: Path,
        seconds: float,
        say: Callable[[str], None] = print,
        keep: int = 3,
        among: Callable[[Any], list[Any]] = lambda value: [value],
        bring: Callable[[], None] = lambda: None,
    ) -> None:
        self.directory, self.seconds, self._say, self._keep = directory, seconds, say, keep
        self._among, self._bring = among, bring
        self._last, self._cost = time.monotonic(), 0.0
        self._saves, self._spent = 0, 0.0

    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._last >= max(self.seconds, 33 * self._cost if self.seconds else 0.0)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write ``state`` (tensors, numbers, strings in dicts and lists) after ``step`` steps; durable when it returns.

        Checkpoints of later steps are removed: training went back because they were damaged or the loop had diverged.
        """
        begin = time.monotonic()
        # Parents are not created: if a disk was unmounted, nothing must be written below its mount point.
        self.directory.mkdir(exist_ok=True)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getvalue()
        write_atomic(self._file(step, ".pt"), data)
        record = {"format": FORMAT, "step": step, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        write_json(self._file(step, ".json"), record)
        self._forget(step)
        self._last = time.monotonic()
        self._cost = self._last - begin
        self._saves, self._spent = self._saves + 1, self._spent + self._cost

    def costs(self) -> dict[str, float]:
        """Return the number of checkpoints saved by this process, and the seconds that took, for the step's record."""
        return {"checkpoints": self._saves, "checkpoint_seconds": round(self._spent, 3)}

    def _file(self, step: int, suffix: str) -> Path:
        return self.directory / f"step-{step:09d}{suffix}"

    def _forget(self, step: int) -> None:
        """Keep the newest few up to ``step``. Records are removed first, because data without a record is ignored."""
        steps = sorted({step_of(p) for p in self.directory.glob("step-*.*")}, reverse=True)
        kept = [s for s in steps if s <= step][: self._keep]
        for old in steps:
            if old not in kept:
                self._file(old, ".json").unlink(missing_ok=True)
                self._file(old, ".pt").unlink(missing_ok=True)

    def load(self) -> tuple[int, dict[str, Any]] | None:
        """Return (steps done, state) of the newest intact checkpoint, on the CPU; None if there is none.

        Ranks that continue together (``among`` is `World.gather`) load the same checkpoint, which is intact on every rank;
        ``bring`` sends their hosts the files of the rank that writes them.
        """
        self._bring()
        for step in self._among([step_of(record) for record in records(self.directory)])[0]:
            state, fault = None, ""
            try:
                state = self._read(step)
            except UserError as e:
                fault = str(e)
            faults = [f for f in self._among(fault) if f]
            if not faults:
                return step, state or {}
            self._say(f"checkpoint skipped: {faults[0]}; continuing from an earlier one")
        return None

    def _read(self, step: int) -> dict[str, Any]:
        """Read the state of one checkpoint. Raises UserError that says what is wrong with it."""
        path, note = self._file(step, ".pt"), self._file(step, ".json")
        try:
            record = read_json(note)
            size, sha256 = record["bytes"], record["sha256"]
            data = path.read_bytes()
        except FileNotFoundError:
            raise UserError(f"{path} is missing") from None
        except (UserError, KeyError, TypeError):
            raise UserError(f"{note} is damaged") from None
        if len(data) != size:
            raise UserError(f"{path} has {len(data)} bytes instead of {size}")
        if hashlib.sha256(data).hexdigest() != sha256:
            raise UserError(f"{path} is damaged (sha256 differs)")
        try:
            state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError) as e:
            raise UserError(f"{path} is not a valid checkpoint ({' '.join(str(e).split())[:80]})") from e
        return state
