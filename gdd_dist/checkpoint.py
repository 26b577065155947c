"""Exact save and resume inside a step: the last two checkpoints, each verified before it is trusted."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gdd_dist.artifacts import read_json, verify_file, write_json
from sharding.errors import UserError
from sharding.files import write_atomic

KEEP = 2


class Checkpoints:
    """Checkpoints of one training loop in ``directory``; ``seconds`` between saves, stretched so that saving costs ≤ 3 %."""

    def __init__(self, directory: Path, seconds: float, say: Callable[[str], None] = print) -> None:
        self.directory, self.seconds, self._say = directory, seconds, say
        self._last, self._cost = time.monotonic(), 0.0

    @property
    def _pointer(self) -> Path:
        return self.directory / "latest.json"

    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._last >= max(self.seconds, 33 * self._cost if self.seconds else 0.0)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write ``state`` (tensors, numbers, strings in dicts and lists) as of after ``step`` steps; durable when it returns."""
        begin = time.monotonic()
        self.directory.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getvalue()
        entry: dict[str, Any] = {
            "step": step,
            "file": f"step-{step:09d}.pt",
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        write_atomic(self.directory / entry["file"], data)
        kept = [entry, *(e for e in self._entries() if e["step"] < step)][:KEEP]
        write_json(self._pointer, {"format": "gdd-checkpoints/1", "checkpoints": kept})
        names = {e["file"] for e in kept}
        for old in self.directory.glob("step-*.pt"):
            if old.name not in names:
                old.unlink()
        self._last = time.monotonic()
        self._cost = self._last - begin

    def _entries(self) -> list[dict[str, Any]]:
        """Newest first; none, and a word to the user, where the list is damaged."""
        if not self._pointer.exists():
            return []
        try:
            listed = read_json(self._pointer)["checkpoints"]
            return [{k: entry[k] for k in ("step", "file", "bytes", "sha256")} for entry in listed]
        except (UserError, KeyError, TypeError):
            self._say(f"{self._pointer} is damaged: its checkpoints are lost, and the step starts over")
            return []

    def load(self) -> tuple[int, dict[str, Any]] | None:
        """(steps done, state) of the newest whole checkpoint, on the CPU; None when there is none to go on from."""
        for entry in self._entries():
            path = self.directory / entry["file"]
            try:
                verify_file(path, entry["bytes"], entry["sha256"], "going on from the one before")
            except UserError as e:
                self._say(f"checkpoint skipped: {e}")
                continue
            return entry["step"], torch.load(path, map_location="cpu", weights_only=True)
        return None
