"""The fingerprint of each step, from settings, inputs and versions alone: known before anything runs."""

from __future__ import annotations

from typing import Any

from gdd_dist import gan, logits, matching, report, teachers
from gdd_dist.artifacts import fingerprint
from gdd_dist.settings import STEPS, Config
from sharding.manifest import Manifest

INPUTS: dict[str, tuple[str, ...]] = {
    "shards": (),
    "teachers": ("shards",),
    "logits": ("shards", "teachers"),
    "gan": ("shards",),
    "matching": ("shards", "teachers", "logits", "gan"),
    "report": ("shards", "teachers", "gan", "matching"),
}
MODULES: dict[str, Any] = {"teachers": teachers, "logits": logits, "gan": gan, "matching": matching, "report": report}


def fingerprints(config: Config, manifest: Manifest, precision: str) -> dict[str, str]:
    """STEP → fingerprint, in the order of the steps. ``shards`` is the data set's own."""
    found = {"shards": manifest.fingerprint}
    for step in STEPS[1:]:
        found[step] = fingerprint(
            {
                "step": step,
                "version": MODULES[step].VERSION,
                "settings": MODULES[step].settings(config),
                "seed": config.step_seed(step),
                "precision": precision,
                "inputs": {name: found[name] for name in INPUTS[step]},
            }
        )
    return found
