"""The result of a check."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARN, FAIL = "ok", "warn", "FAIL"


@dataclass(frozen=True)
class Finding:
    """The result of one check. ``state``: ok, warn (something optional will not work) or FAIL; ``fix``: what to do."""

    name: str
    state: str
    detail: str
    fix: str = ""
