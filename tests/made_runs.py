"""A finished run made of untrained networks, so that the report can be tested without the steps before it. Holds no test."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gdd_dist.config import command_line as configuration
from gdd_dist.config.settings import Config, Loader, Report
from gdd_dist.config.steps import Inputs
from gdd_dist.data.logit_cache import MEANS, logit_file
from gdd_dist.models.classifiers import build_classifier
from gdd_dist.models.files import GENERATOR, TEACHERS, save_network
from gdd_dist.models.generator import Generator
from gdd_dist.runtime.world import World
from gdd_dist.storage.json_files import write_json
from gdd_dist.storage.store import Store, link_latest
from gdd_dist.training.context import Context, seeded
from sharding.manifest import Manifest
from sharding.shards import Shards

HISTORY = [
    {"step": 0, "val": 50.0, "stderr": 1.0, "gap": 9.0},
    {"step": 5, "val": 60.0, "stderr": 1.0, "gap": 8.0},
    {"step": 10, "val": 55.0, "stderr": 1.0, "gap": 30.0},
]
FINGERPRINTS = {
    name: f"{i}" * 16 for i, name in enumerate(("data", "teachers", "logits", "gaussian", "gan", "matching"))
}


def settings(**report: Any) -> Config:
    """Tiny budgets: two student seeds, two epochs."""
    own = {"ipc": (1,), "seeds": 2, "students": ("convnet:8",), "epochs": 2, "full_epochs": 1, **report}
    return Config(precision="float32", device="cpu", loader=Loader(flip=False), report=Report(**own))


@dataclass(frozen=True)
class Made:
    """A run directory whose teachers and generators are untrained."""

    out: Path
    data: Path
    manifest: Manifest
    dirs: dict[str, Path]
    fingerprints: dict[str, str]

    @property
    def inputs(self) -> Inputs:
        """What the report is handed."""
        return Inputs(self.dirs, {**self.fingerprints, "shards": self.fingerprints["data"]}, {})

    def context(self, config: Config, store: Path | None = None) -> Context:
        """One process that sees this run; rows are kept in ``store``, by default the run's own."""
        world = World("cpu")
        torch.set_num_threads(1)
        return Context(config, world, self.data, self.manifest, Store(store or self.out), self.out, "float32")


def make(out: Path, data: Path) -> Made:
    """Untrained networks in the places of finished steps, OUT/config.yaml and OUT/steps.json as a run leaves them."""
    manifest, store = Manifest.load(data), Store(out)
    fps = {**FINGERPRINTS, "data": manifest.fingerprint}
    made_from = {"shards": manifest.fingerprint, **{k: v for k, v in fps.items() if k != "data"}}
    for step in ("teachers", "logits", "gaussian", "gan", "matching"):
        work = store.partial(step, fps[step])
        work.mkdir(parents=True)
        if step == "teachers":
            _teachers(work, manifest)
        elif step == "logits":
            _logits(work, data, manifest)
        else:
            with seeded(0, step):
                net = Generator(classes=len(manifest.classes), channels=1, size=manifest.height, width=16)
            meta = {
                "format": "gdd-generator/1",
                "arch": net.arch,
                "classes": list(manifest.classes),
                "history": HISTORY,
            }
            provenance = {"data": manifest.name, "fingerprints": made_from}
            save_network(work / GENERATOR, net, {**meta, "provenance": provenance})
        link_latest(out, step, store.finish(step, fps[step], {"provenance": {"fingerprints": made_from}}))
    config = dataclasses.replace(settings(), data=str(data), out=str(out))
    (out / "config.yaml").write_text(configuration.to_yaml(config, "digits"))
    record = {"fingerprint": fps["gan"], "status": "computed", "seconds": 1.5, "images_processed": 10}
    write_json(out / "steps.json", {"format": "gdd-steps/1", "steps": {"gan": record}})
    dirs = {step: store.path(step, fps[step]) for step in ("teachers", "logits", "gaussian", "gan", "matching")}
    return Made(out, data, manifest, dirs, fps)


def _logits(work: Path, data: Path, m: Manifest) -> None:
    """Random answers of all four teachers to all of train, one view."""
    rng, classes = np.random.default_rng(0), len(m.classes)
    for teacher in range(4):
        for shard, n in enumerate(Shards(data, m, "train").shard_samples):
            path = logit_file(work, teacher, shard)
            path.parent.mkdir(exist_ok=True)
            np.save(path, rng.normal(size=(1, n, classes)).astype(np.float16))
    np.save(work / MEANS, np.zeros((4, 1, classes, classes), np.float32))


def _teachers(work: Path, m: Manifest) -> None:
    records = []
    for i in range(4):
        file, last = f"teacher-{i:03d}.safetensors", i % 2 == 1
        mean, std = [2 * v - 1 for v in m.mean], [2 * v for v in m.std]
        with seeded(i, "teacher"):
            net = build_classifier("convnet:8", channels=1, size=m.height, classes=10, mean=mean, std=std)
        save_network(work / file, net, {"format": "gdd-classifier/1", "architecture": "convnet:8"})
        step = 30 if last else 10
        records.append(
            {
                "file": file,
                "architecture": "convnet:8",
                "seed": i // 2,
                "step": step,
                "snapshot": i % 2,
                "last": last,
                "val_accuracy": 40.0 + step,
            }
        )
    write_json(work / TEACHERS, {"format": "gdd-teachers/1", "teachers": records})
