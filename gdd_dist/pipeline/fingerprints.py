"""The fingerprint of each step; it needs only settings, inputs and versions, so it is known before anything runs."""

from __future__ import annotations

from gdd_dist.config.settings import Config
from gdd_dist.config.steps import TABLE
from gdd_dist.storage.json_files import fingerprint
from sharding.manifest import Manifest


def fingerprints(config: Config, manifest: Manifest, precision: str) -> dict[str, str]:
    """Return STEP → fingerprint, in the order of the steps. That of ``shards`` is the data set's fingerprint."""
    found = {"shards": manifest.fingerprint}
    for step in TABLE.values():
        own = {"step": step.name, "version": step.version, "settings": step.settings(config)}
        inputs = {name: found[name] for name in step.shaped_by(config)}
        shaping = {**own, "seed": config.step_seed(step.name), "precision": precision, "inputs": inputs}
        found[step.name] = fingerprint(shaping)
    return found
