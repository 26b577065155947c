"""What all tests share: a small data set, settings that make every step take about a second, one undisturbed run."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is there, here and in every process that tests start
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # results are compared bit by bit, and ranks outnumber GPUs

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hooks
import pytest
import ranks
import torch

from sharding.options import Options
from sharding.writer import build

torch.set_num_threads(1)

TINY = (
    "--teachers.architectures convnet:8 --teachers.seeds 2 --teachers.snapshots 2 --teachers.epochs 1 "
    "--logits.views 2 "
    "--gan.steps 12 --gan.batch 16 --gan.width 16 --gan.d_width 16 --gan.blocks 1 "
    "--matching.steps 12 --matching.batch 16 --matching.group 2 --matching.interval 6 "
    "--matching.quick_steps 5 --matching.quick_student convnet:8 --matching.quick_students 2 "
    "--report.epochs 2 --report.seeds 2 --report.students convnet:8 --report.full_epochs 1"
)


@dataclass(frozen=True)
class Finished:
    """A run that ended well. ``argv``: its settings without --out; ``steps``: what steps.json said; ``err``: what rank 0 said."""

    out: Path
    argv: list[str]
    steps: dict[str, Any]
    err: str = ""

    def copy(self, to: Path, *steps: str) -> Path:
        """A store that holds these steps alone, with the same fingerprints."""
        for step in steps:
            source = self.out / step / self.steps[step]["fingerprint"]
            shutil.copytree(source, to / step / source.name)
        return to


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as a data set of several shards."""
    data = tmp_path_factory.mktemp("data") / "digits"
    build("digits", data, Options(shard_size=400_000, workers=1))
    return data


@pytest.fixture(scope="session")
def tiny(digits: Path) -> list[str]:
    """Settings that make every step take about a second, on `digits`."""
    return ["--data", str(digits), *TINY.split()]


@pytest.fixture(scope="session")
def undisturbed(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Four ranks up to matching, never interrupted, with a checkpoint at every step, and no look at the test split."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    argv = [*tiny, "--until", "matching", "--checkpoint_seconds", "0"]
    return Finished(out, argv, ranks.train(out, argv, 4, before=hooks.no_test_data))


@pytest.fixture(scope="session")
def reported(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One process, all steps; it says each time how far it is."""
    out = tmp_path_factory.mktemp("reported") / "out"
    ended = ranks.start(out, tiny, before=hooks.talkative).wait()
    assert ended.codes == [0], ended.text
    return Finished(out, tiny, ranks.steps(out), ended.err[0])
