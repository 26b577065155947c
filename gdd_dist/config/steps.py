"""The definition of each step: name, inputs, VERSION of its results, the settings that shape them, and its fingerprint.

The table imports no step, so programs that only need fingerprints, such as `status`, load neither torch nor a step's code.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdd_dist.models import pretrained
from gdd_dist.models.names import has_batch_norm
from gdd_dist.storage.json_files import fingerprint
from sharding.manifest import Manifest

if TYPE_CHECKING:  # avoids a circular import: the settings import the names of the steps
    from gdd_dist.config.settings import Config

ROWS_VERSION = 3
"""The version of the report's rows, which are stored one by one: raised when a student's results change."""
CUTS = ("ranks_per_teacher", "accumulate", "activation_checkpointing")
"""Settings for how a teacher's batch is split and recomputed: with batch normalization they change results."""


@dataclass(frozen=True)
class Inputs:
    """The inputs of a step. ``directories``: of the finished steps that it reads; ``fingerprints``: of all steps;
    ``provenance``: the metadata of its output files.
    """

    directories: Mapping[str, Path]
    fingerprints: Mapping[str, str]
    provenance: Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """One step. ``version``: raised when its results change; ``settings``: the settings that shape them, as JSON.

    ``shapes``: steps whose fingerprints are part of its own, except those that ``needs`` (input → whether these settings need it)
    excludes; ``reads``: further steps that it reads, which are determined by those.
    """

    name: str
    version: int
    shapes: tuple[str, ...]
    settings: Callable[[Config], dict[str, Any]]
    reads: tuple[str, ...] = ()
    needs: Mapping[str, Callable[[Config], bool]] = field(default_factory=dict)

    def shaped_by(self, config: Config) -> tuple[str, ...]:
        """Return the steps whose fingerprints are part of its own."""
        return tuple(name for name in self.shapes if name not in self.needs or self.needs[name](config))

    def inputs(self, config: Config) -> tuple[str, ...]:
        """Return the finished steps that it reads, without the shards."""
        return tuple(name for name in TABLE if name in self.shaped_by(config) + self.reads)

    def run(self, ctx: Any, work: Path, inputs: Inputs) -> dict[str, Any]:
        """Compute the step in the directory ``work``; returns its record. All ranks call it."""
        found: dict[str, Any] = importlib.import_module(f"gdd_dist.steps.{self.name}").run(ctx, work, inputs)
        return found


def _teachers(config: Config) -> dict[str, Any]:
    if config.teachers.pretrained:
        return {"pretrained": pretrained.hashes(config.teachers.pretrained)}
    shaping = {**config.shaping("teachers"), "loader": config.shaping("loader")}
    if any(has_batch_norm(name) for name in config.teachers.architectures):
        shaping |= {name: getattr(config.teachers, name) for name in CUTS}
    return shaping


def _gaussian(config: Config) -> dict[str, Any]:
    names = ("quick_students", "quick_student", "quick_steps", "quick_batch")
    quick = {**_some(config.shaping("matching"), *names), "seed": config.step_seed("gaussian")}
    shaping = {**config.shaping("gaussian"), "quick": quick, "student": _student(config)}
    return {**shaping, "loader": config.shaping("loader")}


def _gan(config: Config) -> dict[str, Any]:
    gan = _changed(config.shaping("gan"), start="noise")
    return {**gan, "loader": _some(config.shaping("loader"), "streams", "window", "flip")}


def _matching(config: Config) -> dict[str, Any]:
    matching = _changed(config.shaping("matching"), start="gan", lambda_label=0, lambda_feature=0)
    return {
        **matching,
        "loader": config.shaping("loader"),
        "student": _student(config),
        "gan": _some(config.shaping("gan"), "augment", "augment_p", "beta1", "beta2"),
    }


def _report(config: Config) -> dict[str, Any]:
    report, loader = config.shaping("report"), _some(config.shaping("loader"), "augment", "flip", "window")
    return {**_changed(report, condense=0), "rows": ROWS_VERSION, "loader": loader}


def _student(config: Config) -> dict[str, Any]:
    """Return the settings of the report's students that also apply to quick students."""
    return _some(config.shaping("report"), "lr", "momentum", "weight_decay")


def _changed(settings: Mapping[str, Any], **before: Any) -> dict[str, Any]:
    """Return ``settings`` without those at the value ``before`` they existed, which keeps the fingerprints from then."""
    return {name: value for name, value in settings.items() if name not in before or value != before[name]}


def _some(settings: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: settings[name] for name in names}


TABLE: dict[str, Step] = {
    step.name: step
    for step in (
        Step("teachers", 1, ("shards",), _teachers),
        Step("logits", 1, ("shards", "teachers"), lambda c: {**c.shaping("logits"), "loader": c.shaping("loader")}),
        Step("gaussian", 1, ("shards",), _gaussian),
        Step("gan", 2, ("shards", "gaussian"), _gan, needs={"gaussian": lambda c: c.gan.start == "gaussian"}),
        Step("matching", 2, ("shards", "teachers", "logits", "gaussian", "gan"), _matching),
        Step("report", 3, ("shards", "teachers", "gaussian", "gan", "matching"), _report, reads=("logits",)),
    )
}
"""The steps after the shards, in order."""
STEPS = ("shards", *TABLE)


def fingerprints(config: Config, manifest: Manifest, precision: str) -> dict[str, str]:
    """Return STEP → fingerprint, in the order of the steps, before anything runs. That of ``shards`` is the data set's."""
    found = {"shards": manifest.fingerprint}
    for step in TABLE.values():
        own = {"step": step.name, "version": step.version, "settings": step.settings(config)}
        inputs = {name: found[name] for name in step.shaped_by(config)}
        shaping = {**own, "seed": config.step_seed(step.name), "precision": precision, "inputs": inputs}
        found[step.name] = fingerprint(shaping)
    return found
