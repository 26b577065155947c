"""The recorded numbers of each step, and the one command that renews them: python tests/golden_numbers.py [STEP ...].

A record (tests/golden/STEP.json) holds what a tiny run leaves behind: losses, weights, logits. It names the VERSION of its step
and of every step before it, for their numbers shape its own. Holds no test.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import events
import numpy as np
import torch
from safetensors.torch import load_file

from gdd_dist.config import command_line as configuration
from gdd_dist.config.steps import ROWS_VERSION, TABLE
from gdd_dist.evaluation import rows
from gdd_dist.evaluation.students import Frozen
from gdd_dist.evaluation.students import train as train_student
from gdd_dist.pipeline.run import run as run_steps
from gdd_dist.runtime.world import World
from gdd_dist.storage.json_files import read_json
from gdd_dist.storage.store import Store
from gdd_dist.training.context import Context
from sharding.errors import UserError
from sharding.files import write_atomic
from sharding.manifest import Manifest
from sharding.options import Options
from sharding.writer import build

RECORDS = Path(__file__).parent / "golden"
SETTINGS = RECORDS / "settings.yaml"
SHARDS = Options(shard_size=400_000, workers=1)
"""The data set is the digits in several shards, as the fixture `digits` of the tests."""
_CONFIG = configuration.parse(["--config", str(SETTINGS)]).config


def _before(step: str) -> tuple[str, ...]:
    near = TABLE[step].inputs(_CONFIG)
    return tuple(name for name in TABLE if name in near or any(name in _before(one) for one in near))


MOVED = "moved"
MOVES = (
    "--matching.start gaussian --matching.lambda_label 0.05 --matching.lambda_feature 1 --matching.lambda_adv 0".split()
)
"""`moved` is matching with these settings: it moves the Gaussians, and has the terms that are off in the record of matching."""
BEFORE = {"students" if step == "report" else step: _before(step) for step in TABLE} | {MOVED: _before("matching")}
"""Step → the steps whose numbers shape its own, from config/steps.py. `students` are those of the report."""
ROWS = (
    "full/all/hard/augmented",
    "real/regenerate/hard/augmented",
    "gan/regenerate/soft/augmented",
    "matched/fixed/soft/augmented",
    "real/fixed/hard/plain",
)
"""Rows of the report that differ in what a student trains on."""
TOLERANCE = {"losses": 2e-3, "weights": 1e-2, "logits": 1e-2}
"""Kind of number → how far it may lie from the record, as a share of the largest number beside it (at least of SMALL).

Measured without oneDNN, with two threads, with the instructions of older CPUs and with noise of 1e-6 in every convolution: at most an
eighth of this for losses and weights, a quarter for logits, which are float16.
"""
NEW, MISSING = " (new: not in the record)", " (missing: only in the record)"
SMALL = 0.02
"""Numbers below this, such as the biases after a few steps, are not compared closer than a number of this size."""
NOT_RECORDED = {"images_per_second", "val_accuracy", "val_stderr", "shortcut_gap"}
"""In TensorBoard's tags: a speed, and accuracies, which jump by an image."""
Values = dict[str, dict[str, list[float]]]
"""Kind → name → numbers of one scale."""


# the package, as far as it is known here


def versions() -> dict[str, int]:
    """Step → VERSION in the code."""
    special = {"students": ROWS_VERSION, MOVED: TABLE["matching"].version}
    return {step: special.get(step) or TABLE[step].version for step in BEFORE}


def run(data: Path, out: Path, step: str, *given: str) -> None:
    """Compute the steps up to ``step`` into ``out``, but for those that lie there finished; ``given``: more settings."""
    own, name = place(step, out)
    argv = ["--config", str(SETTINGS), "--data", str(data), "--out", str(own), "--store", str(out), "--until", name]
    asked = configuration.parse([*argv, *(MOVES if step == MOVED else []), *given])
    run_steps(World("cpu"), asked.config, asked.preset, data, own)


def place(step: str, out: Path) -> tuple[Path, str]:
    """The directory of the run, and the step as this calls it: `moved` is a run of its own on the store ``out``."""
    return (out / MOVED, "matching") if step == MOVED else (out, step)


def student_weights(data: Path, out: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Row → weights of a student of the report after its training, for ROWS."""
    config = configuration.parse(["--config", str(SETTINGS), "--data", str(data), "--out", str(out)]).config
    manifest, dirs = Manifest.load(data), {step: out / step / "latest" for step in BEFORE["students"]}
    ctx = Context(config, World("cpu"), data, manifest, Store(out), out, "float32")
    fresh, nets, found = ctx.classifier, [], {}
    ctx.classifier = lambda *args: nets.append(fresh(*args)) or nets[-1]  # type: ignore[method-assign, func-returns-value]
    for job in rows.jobs(config, manifest, "float32", dict.fromkeys(("data", *dirs), "0" * 16)):
        r = job.row
        name = "/".join((r.train_on, r.protocol or "all", r.labels, "augmented" if r.augmented else "plain"))
        if name in ROWS:
            train_student(ctx, Frozen(ctx, dirs), job)
            found[name] = nets[-1].state_dict()
    return found


# what is recorded


def numbers(step: str, data: Path, out: Path) -> Values:
    """What ``step``, finished in ``out``, is recorded by."""
    if step == "students":
        weights = {f"{row}/{k}": v for row, net in student_weights(data, out).items() for k, v in net.items()}
        return {"weights": {k: summary(v.numpy()) for k, v in weights.items()}}
    out, step = place(step, out)
    directory = out / step / "latest"
    if step == "logits":
        return {"logits": dict(_logits(directory))}
    found: Values = {"weights": {}}
    for path in sorted(directory.glob("*.safetensors")):
        found["weights"] |= {f"{path.stem}/{k}": summary(v.numpy()) for k, v in sorted(load_file(path).items())}
    curves = events.scalars(out / "tensorboard" / step)
    shown = sorted(k for k in curves if not {*k.split("/")} & NOT_RECORDED)
    found["losses"] = {k: rounded(np.array([curves[k][i] for i in sorted(curves[k])])) for k in shown}
    return found


def _logits(directory: Path) -> Iterator[tuple[str, list[float]]]:
    for path in sorted(directory.rglob("*.npy")):
        values, name = np.load(path).astype(np.float64), str(path.relative_to(directory))
        if values.ndim == 3:  # [V, n, C]
            for v, answers in enumerate(values):
                yield f"{name}/view {v}/row 0", rounded(answers[0])
                yield f"{name}/view {v}", summary(answers)
        else:  # class means [T, V, C, C]
            yield from ((f"{name}/teacher {t}", summary(part)) for t, part in enumerate(values))


def summary(values: np.ndarray) -> list[float]:
    """Root mean square, then the first three entries: all on one scale."""
    flat = values.astype(np.float64).ravel()
    return rounded(np.append(np.sqrt(np.mean(flat**2)), flat[:3]))


def rounded(values: np.ndarray) -> list[float]:
    """Six digits: more is noise."""
    return [float(f"{v:.6g}") for v in values]


# records


def record_path(step: str) -> Path:
    """Where the record of ``step`` lies."""
    return RECORDS / f"{step}.json"


def current(step: str) -> dict[str, int]:
    """VERSION in the code of ``step`` and of each step that shapes it."""
    known = versions()
    return {name: known[name] for name in (step, *BEFORE[step])}


def write_record(step: str, values: Values) -> None:
    """JSON with a line for each name, so that a difference can be read."""
    head = {"format": "gdd-golden/1", "step": step, "versions": current(step), "torch": torch.__version__}
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    for kind, named in values.items():
        listed = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in named.items())
        lines.append(f" {json.dumps(kind)}: {{\n{listed}\n }}")
    write_atomic(record_path(step), ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def read_record(step: str) -> tuple[dict[str, int], Values]:
    """The versions that a record names, and its numbers."""
    record = read_json(record_path(step))
    return record["versions"], {kind: record[kind] for kind in TOLERANCE if kind in record}


def deviations(recorded: Values, found: Values) -> dict[str, float]:
    """KIND/NAME → largest difference, in tolerances: 1 is the most that passes. Infinite where names or lengths differ; a name that
    only one side has ends with ``NEW`` or ``MISSING``.
    """
    result = {}
    for kind in recorded.keys() | found.keys():
        old, new = recorded.get(kind, {}), found.get(kind, {})
        for name in old.keys() | new.keys():
            a, b = np.array(old.get(name, [])), np.array(new.get(name, []))
            alike = name in old and name in new and a.shape == b.shape and np.isfinite(b).all()
            scale = max(np.abs(a).max(initial=0), SMALL) * TOLERANCE[kind]
            said = NEW if name not in old else MISSING if name not in new else ""
            result[f"{kind}/{name}{said}"] = float(np.abs(a - b).max() / scale) if alike else np.inf
    return result


def completed(recorded: Values, found: Values) -> Values:
    """The record with the names that only ``found`` has. Empty if there are none, or a recorded number is missing or changed."""
    off = {name for name, value in deviations(recorded, found).items() if not value <= 1}
    if not off or not all(name.endswith(NEW) for name in off):
        return {}
    return {kind: {**named, **recorded.get(kind, {})} for kind, named in found.items()}


def due(step: str) -> bool:
    """Whether a VERSION that the record of ``step`` names was raised, or there is no record."""
    return not record_path(step).exists() or read_record(step)[0] != current(step)


def renew(steps: Sequence[str]) -> None:
    """Write the records of ``steps`` anew. Where no VERSION that a record names was raised, only new names are added to it.

    Raises UserError where there are none, or a recorded number is missing or changed.
    """
    if unknown := [step for step in steps if step not in BEFORE]:
        raise UserError(f"unknown step {unknown[0]}; there are {', '.join(BEFORE)}")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "data", Path(folder) / "out"
        build("digits", data, SHARDS)
        for step in steps:
            run(data, out, BEFORE[step][-1] if step == "students" else step)
            values = numbers(step, data, out)
            found[step] = values if due(step) else completed(read_record(step)[1], values)
            if not found[step]:
                raise UserError(f"VERSION of {step} is still {versions()[step]}; raise it when its numbers change")
    for step, values in found.items():
        write_record(step, values)


def main(steps: Sequence[str]) -> int:
    """Renew the records of ``steps``, by default of all whose VERSION was raised. Returns the exit status.

    A step that only shows more (another curve) must be named: its record then gets what is new.
    """
    try:
        renew(steps or [step for step in BEFORE if due(step)])
    except UserError as e:
        sys.stderr.write(f"error: {e}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
