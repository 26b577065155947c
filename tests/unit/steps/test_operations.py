"""What the training steps ask of a device, counted on one that computes nothing: no copy, nothing read back, so many operations."""

import shutil
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import golden_numbers as golden
import numpy as np
import pytest
import torch
from operations import META, Counted

from gdd_dist.config import command_line as configuration
from gdd_dist.config.steps import TABLE, Inputs, fingerprints
from gdd_dist.dry_run.estimates import ESTIMATES
from gdd_dist.dry_run.trial import SILENT, Trial
from gdd_dist.models.classifiers import CLASSIFIERS, build_classifier
from gdd_dist.models.files import GENERATOR, save_network
from gdd_dist.models.gaussian import LinearGenerator
from gdd_dist.runtime.meter import Meter
from gdd_dist.runtime.world import World
from gdd_dist.steps import gan, matching, teachers
from gdd_dist.steps.teacher_pool import pool
from gdd_dist.storage.store import Store
from gdd_dist.training.classifier_fit import sgd, train_step
from gdd_dist.training.context import Context
from gdd_dist.training.skipped_steps import Skips
from sharding.manifest import Manifest

pytestmark = pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
OPERATIONS = {
    "teachers": 108,
    "student": 50,
    "gan": 555,
    "matching": {1: 708, 4: 795},
    "start gaussian": {"gan": 636, "matching": 840},
}
"""Of each step of the golden records' run, at most; of matching by the number of teachers in the batch.
Each costs a GPU's host some microseconds."""


def context(data: Path, out: Path, *settings: str) -> Context:
    argv = ["--config", str(golden.SETTINGS), "--data", str(data), "--out", str(out), *settings]
    config, manifest = configuration.parse(argv).config, Manifest.load(data)
    return Context(config, World("cpu"), data, manifest, Store(out), out, "float32", keeps=False)


@pytest.fixture(scope="module")
def inputs(digits, tmp_path_factory):
    """Made-up files of finished steps."""
    out = tmp_path_factory.mktemp("operations")
    ctx = context(digits, out)
    trial = Trial(ctx, Meter(ctx.world), fingerprints(ctx.config, ctx.manifest, "float32"), out)
    for step in list(TABLE)[:-2]:
        trial.directories[step].mkdir()
        ESTIMATES[step][0](trial, trial.directories[step])
    torch.set_num_threads(1)
    return Inputs(trial.directories, {}, {})


@pytest.fixture
def on_meta(digits, tmp_path, monkeypatch):
    """Makes a context whose device is the meta device. Whoever reads a number from it fails."""
    for kind in ("fused", "foreach"):  # torch lists the devices that have such kernels; this one needs none
        name = f"_get_{kind}_kernels_supported_devices"
        monkeypatch.setattr(import_module("torch.optim.optimizer"), name, lambda: ["meta", "cpu"])
    monkeypatch.setattr("gdd_dist.training.skipped_steps.on_its_way", lambda moved: lambda: True)

    def make(*settings):
        ctx = context(digits, tmp_path, *settings)
        ctx.world.device = META
        torch.set_num_threads(1)
        return ctx

    return make


def counted(step, *of):
    """Operations of ``step(*of)``, a second time, when there is a state of the optimizer. It copies nothing."""
    for _ in range(2):
        with Counted() as found:
            step(*of)
    assert dict(found.copies) == {}
    return found.operations.total()


def test_a_teachers_step(on_meta, tmp_path):
    ctx = on_meta()
    pupil = teachers.Pupil(ctx, pool(ctx.config, 8)[0], tmp_path, SILENT, 0)
    assert counted(pupil.train, 0, pupil.read(0)) <= OPERATIONS["teachers"]


def test_a_students_step(on_meta):
    ctx = on_meta()
    net = ctx.classifier("convnet:8", 0, "x")
    x, y = ctx.sent((torch.zeros(4, 1, 16, 16), torch.zeros(4, dtype=torch.int64)))
    step, skips = (net, sgd(net, 0.1, 0.9, 5e-4), x, y, 0.1, "float32"), Skips()
    assert counted(lambda: skips.note(train_step(*step))) <= OPERATIONS["student"]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classifier_can_train_deterministically(name):
    """No operation of its forward and backward lacks a kernel that always adds in the same order."""
    net = build_classifier(name, channels=3, size=32, classes=4, mean=[0.0] * 3, std=[1.0] * 3).to(META)
    with Counted() as found:
        net(torch.zeros(2, 3, 32, 32, device=META).requires_grad_()).square().sum().backward()
    assert found.operations.total() > 20


def test_a_gan_step(on_meta, inputs, tmp_path):
    trainee = gan.GanTraining(on_meta(), tmp_path, inputs)
    assert counted(trainee.train, 0, trainee.read(0)) <= OPERATIONS["gan"]


@pytest.mark.parametrize("teachers", [1, 4])
def test_a_matching_step(on_meta, inputs, tmp_path, teachers):
    """Each teacher beyond the first adds its own forward and backward, and nothing else."""
    ctx, dirs = on_meta(), inputs.directories
    answers = matching.Pool(ctx, dirs["teachers"], dirs["logits"])
    trainee = matching.Matching(ctx, tmp_path, answers, inputs)
    batch = trainee.read(0)
    groups = replace(batch.groups, teachers=np.arange(len(batch.groups.teachers)) % teachers).by_teacher()
    step = (ctx, trainee.nets, answers, 0, batch._replace(groups=groups))
    assert counted(matching.matching_step, *step) <= OPERATIONS["matching"][teachers]


@pytest.mark.parametrize("step", ["gan", "matching"])
def test_a_generator_that_starts_at_the_gaussian(on_meta, inputs, tmp_path, monkeypatch, step):
    """Which class's root a row needs is settled on the device too."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # torch has none for this device
    ctx, dirs = on_meta("--gan.start", "gaussian"), inputs.directories
    made, trained = gan.networks(ctx, inputs)[0], shutil.copytree(dirs["gan"], tmp_path / "gan")
    save_network(trained / GENERATOR, made, ctx.generator_meta(made, {}))
    with monkeypatch.context() as patch:
        patch.setattr(
            type(made), "named_buffers", lambda *_: iter(())
        )  # the host keeps what no step moves: here there is nothing
        if step == "gan":
            trainee = gan.GanTraining(ctx, tmp_path, inputs)
        else:
            answers = matching.Pool(ctx, dirs["teachers"], dirs["logits"])
            changed = replace(inputs, directories={**dirs, "gan": trained})
            trainee = matching.Matching(ctx, tmp_path, answers, changed)
    assert isinstance(trainee.nets.generator.linear, LinearGenerator)
    assert counted(trainee.train, 1, trainee.read(1)) <= OPERATIONS["start gaussian"][step]  # step 0 is pictured


def test_what_a_deterministic_run_refuses_is_noticed():
    x = torch.zeros(1, 1, 4, 4, device=META).requires_grad_()
    with Counted(), pytest.raises(AssertionError, match="--deterministic refuses"):
        torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear").sum().backward()


def test_what_would_stop_the_host_is_noticed(on_meta):
    ctx = on_meta()
    with Counted() as found:
        torch.zeros(3, device=META)[torch.tensor([0, 2])] + torch.zeros(2).to(META)
    assert found.copies.total() == 2
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(ctx.fill.isfinite().all())
