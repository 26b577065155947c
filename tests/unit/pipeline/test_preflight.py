"""What is known at the start is said at the start."""

import dataclasses

import pytest
import torch

from gdd_dist.config.command_line import parse
from gdd_dist.config.settings import Config
from gdd_dist.models.gaussian import LinearGenerator
from gdd_dist.models.residual_generator import started_at
from gdd_dist.pipeline import memory_needed
from gdd_dist.pipeline.dataset import data_directory
from gdd_dist.pipeline.preflight import check, fitted
from sharding.errors import UserError
from sharding.manifest import Manifest

CPU = torch.device("cpu")


def test_a_batch_is_no_larger_than_a_small_set(digits):
    whole = Manifest.load(digits)
    few = dataclasses.replace(whole.splits["train"], samples=26)
    small = dataclasses.replace(whole, splits={**whole.splits, "train": few})
    config = parse(["--gan.batch", "16"]).config
    assert fitted(config, whole) == (config, "")
    found, line = fitted(config, small)
    assert (found.teachers.batch, found.gan.batch) == (16, 16)
    assert line == "data: only 26 training images: --teachers.batch 64 becomes 16"
    assert dataclasses.replace(found, teachers=config.teachers) == config  # nothing else is touched


def test_one_class_alone_is_refused(digits):
    manifest = dataclasses.replace(Manifest.load(digits), classes=("7",))
    with pytest.raises(UserError, match="only one class"):
        check(parse([]).config, manifest, 1, CPU)


def test_memory_is_counted_without_any_being_taken_and_names_its_setting(digits, monkeypatch):
    config, manifest = parse(["--gan.width", "528"]).config, Manifest.load(digits)
    needs = dict([*memory_needed.networks(config, manifest, 1), *memory_needed.batches(config, manifest, 1)])
    assert needs["--gan.batch 64"] == 64 * (4 * 16 * 16 + 4 * 64)
    conv = 3 * 4 * (128 * 9 + 2 * 128 * 128 * 9 + 3 * 2 * 128 + 128 * 4 * 10 + 10)
    assert needs["--report.students convnet"] == conv
    most = max(needs.values())
    monkeypatch.setattr(memory_needed, "all_memory", lambda _device: most)
    check(config, manifest, 1, CPU)
    monkeypatch.setattr(memory_needed, "all_memory", lambda _device: most - 1)
    with pytest.raises(UserError, match="needs at least .* GB of memory"):
        check(config, manifest, 1, CPU)


def test_memory_is_counted_for_the_generator_that_the_gan_trains(digits):
    config, manifest = parse(["--gan.start", "gaussian", "--gan.width", "16"]).config, Manifest.load(digits)
    needs, g = next(need for _, need in memory_needed.networks(config, manifest, 1)), config.gan
    linear = LinearGenerator(classes=10, channels=1, size=16, latent=32)
    made = started_at(linear, noise=g.latent, width=g.width, blocks=g.blocks, patch=g.patch)
    assert needs == 4 * 5 * sum(p.numel() for p in made.parameters())


def test_local_data_needs_no_home_and_remote_data_says_what_it_needs(digits, monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where the user has no entry in passwd
    assert data_directory(Config(data=str(digits))) == digits
    with pytest.raises(UserError, match=r"give --loader\.cache_dir, or set HOME"):
        data_directory(Config(data="https://127.0.0.1:9/x"))
