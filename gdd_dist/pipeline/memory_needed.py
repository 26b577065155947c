"""Refuses a run that would not fit in memory: its minimum is counted before anything is allocated."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from gdd_dist.config.ranks import taking_part
from gdd_dist.config.settings import Config
from gdd_dist.models.classifiers import classifier_weights, count_weights, parse_classifier
from gdd_dist.models.discriminator import Discriminator
from gdd_dist.models.gaussian import LinearGenerator
from gdd_dist.models.names import TORCHVISION
from gdd_dist.models.residual_generator import new_generator
from gdd_dist.runtime.memory import all_memory
from sharding.errors import UserError
from sharding.manifest import Manifest

_SGD, _ADAM, _RUNNING_MEAN = 3, 4, 1
"""Numbers kept for each weight: the weight, its gradient and the optimizer's moments; the copy for the EMA."""


def check_memory(config: Config, manifest: Manifest, world: int, device: torch.device) -> None:
    """Raise UserError for the first setting whose network or batch does not fit in the memory of a rank's device."""
    have = all_memory(device)
    # Counting imports torch._dynamo, which takes as long as importing torch; usual widths fit anyway.
    counted = () if usual(config, manifest) else networks(config, manifest, world)
    for names, need in (*counted, *batches(config, manifest, world)):
        if need > have:
            what = f"{names} needs at least {need / 1e9:,.1f} GB of memory"
            raise UserError(f"{what}, but only {have / 1e9:,.1f} GB are available; lower it")


def usual(config: Config, manifest: Manifest) -> bool:
    """Whether widths and depths show that no network of these settings needs more than a gigabyte in training."""
    g, m, r = config.gan, config.matching, config.report
    names = (*config.teachers.architectures, m.quick_student, *r.students)
    widths = [parse_classifier(name)[1] or 0 for name in names if not name.startswith(TORCHVISION)]
    small = max(g.width, g.d_width) <= 512 and max(g.blocks, g.d_blocks) <= 4 and g.latent <= 1024
    return small and max(widths) <= 128 and manifest.height <= 128 and len(manifest.classes) <= 1000


def networks(config: Config, manifest: Manifest, world: int) -> Iterator[tuple[str, float]]:
    """Yield (the settings that determine its size, bytes) for each network in training."""
    g, classes, m, size = config.gan, len(manifest.classes), manifest, manifest.height
    # ZeRO may distribute everything except the generator's EMA over the ranks.
    share = world if config.engine == "deepspeed" else 1
    shape: dict[str, Any] = {"classes": classes, "channels": m.channels, "size": size}

    def generator() -> nn.Module:
        # What is trained of it does not depend on the latent of its linear part.
        linear = LinearGenerator(**shape, latent=1) if g.start == "gaussian" else None
        return new_generator(linear, **shape, latent=g.latent, width=g.width, blocks=g.blocks, patch=g.patch)

    def discriminator() -> nn.Module:
        return Discriminator(**shape, width=g.d_width, blocks=g.d_blocks, patch=g.patch)

    kept = _ADAM / share + _RUNNING_MEAN
    yield "the generator (--gan.width, --gan.blocks, --gan.latent)", 4 * count_weights(generator) * kept
    yield "the discriminator (--gan.d_width, --gan.d_blocks)", 4 * count_weights(discriminator) * _ADAM / share
    used = {
        "teachers.architectures": () if config.teachers.pretrained else config.teachers.architectures,
        "matching.quick_student": (config.matching.quick_student,),
        "report.students": config.report.students,
    }
    for setting, names in used.items():
        for name in dict.fromkeys(names):
            yield f"--{setting} {name}", 4 * _SGD * classifier_weights(name, **shape)


def batches(config: Config, manifest: Manifest, world: int) -> Iterator[tuple[str, float]]:
    """Yield (setting, bytes) for a rank's share of the float images, or latents, of a training step."""
    t, g, m, r = config.teachers, config.gan, config.matching, config.report
    of_gan, of_matching = (taking_part(config, step, world) * config.accumulate for step in ("gan", "matching"))
    pixels = 4 * manifest.channels * manifest.height * manifest.width
    yield f"--teachers.batch {t.batch}", t.batch / t.ranks_per_teacher / t.accumulate * pixels
    yield f"--logits.batch {config.logits.batch}", min(config.logits.batch, manifest.splits["train"].samples) * pixels
    yield f"--gan.batch {g.batch}", g.batch / of_gan * (pixels + 4 * g.latent)
    yield f"--matching.batch {m.batch}", m.batch / of_matching * (pixels + 4 * g.latent)
    yield f"--matching.quick_batch {m.quick_batch}", m.quick_batch * pixels
    ipc = max(r.ipc)
    yield f"--report.ipc {ipc}", ipc * len(manifest.classes) * pixels / 4  # a fixed set is stored as uint8
