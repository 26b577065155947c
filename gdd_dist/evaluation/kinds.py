"""What the report's rows train on. Imports little, because tables are printed without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GENERATORS = {"gaussian": "gaussian", "gan": "gan", "matched": "matching"}
"""What a row trains on → the step whose generator draws it."""
BASELINES = ("real", "equal_bytes", "gaussian", "gan", "full")
"""What baseline rows may train on, in the order of the table. ``equal_bytes``: a fixed set of stored real images that together
take as many bytes as the matched generator's file; each epoch draws from it.
"""


def kind_of(r: Mapping[str, Any]) -> str:
    """Return what a row of metrics.json trains on as text: `matched`, `matched, best of 3`, or `matched, condensed`."""
    return (
        str(r["train_on"]) + (f", best of {r['select']}" if "select" in r else "") + (", condensed" * ("condense" in r))
    )
