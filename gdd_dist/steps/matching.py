"""Step: train the generator until the teachers' logits on its images have the distribution of those on real images of the same class.

`matching_step` is the method: generate, train the discriminator, compare with the cache, add the terms, step.
Shapes: B this rank's slots, in G groups of n that share a class and a teacher; L latent, C classes, H W pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gdd_dist.config.steps import Inputs
from gdd_dist.data.augment import AUGMENT_DRAWS
from gdd_dist.data.noise import normal, uniform
from gdd_dist.evaluation.quick_students import INTERVAL, Candidates, Measurement, best, measure
from gdd_dist.models.files import (
    DISCRIMINATOR,
    GENERATOR,
    cpu_state,
    load_discriminator_network,
    load_generator_network,
    save_network,
)
from gdd_dist.models.gaussian import LinearGenerator
from gdd_dist.models.moved_gaussian import MovedGaussian
from gdd_dist.steps.matching_groups import Groups
from gdd_dist.steps.matching_pool import Pool
from gdd_dist.training import loop, losses
from gdd_dist.training.adversaries import Adversaries, RealSide, augmentation, ema_decay, mean_scalars, mirrored
from gdd_dist.training.context import Context
from gdd_dist.training.gaussian_fit import chosen
from gdd_dist.training.sample_grid import sample_grid
from gdd_dist.training.schedules import cosine


def run(ctx: Context, work: Path, inputs: Inputs) -> dict[str, Any]:
    """Write generator.safetensors into ``work``. At intervals ``ctx.on_interval`` is called on rank 0."""
    pool = Pool(ctx, inputs.directories["teachers"], inputs.directories["logits"])
    pool.look()
    checkpoints = ctx.shared_checkpoints(work)
    matched = loop.train(
        ctx,
        lambda: Matching(ctx, work, pool, inputs),
        ctx.world,
        checkpoints,
        "matching",
        "lower --matching.lr, or raise --matching.temperature",
    )
    # Where the Gaussians move, the first interval has measured them.
    others = {} if ctx.config.matching.start == "gaussian" else {"gaussian": chosen(inputs.directories["gaussian"])}
    candidates = Candidates(matched.history, others)
    matched.finish(work, inputs, candidates)
    kept = {"history": matched.history, "others": others, "selected": ctx.config.matching.select}
    return {**kept, "skipped_steps": matched.skips.total, **checkpoints.costs()}


class Batch(NamedTuple):
    """One rank's share of a step, in the order of teachers: groups, labels, random numbers, cached logits and real images.

    ``labels``: int64 [B]; ``z``: latents float32 [B, L]; ``draws``: of the teachers' augmentation, float32 [B, AUGMENT_DRAWS];
    ``plain``: bool [B], true for images that are not augmented; ``real_logits``: cached logits of the real image of each pair, float32 [B, C];
    ``means``: mean logits of each group's class, float32 [G, C]; ``real``: None without the adversarial term.
    """

    groups: Groups
    labels: Tensor
    z: Tensor
    draws: Tensor
    plain: Tensor
    real_logits: Tensor
    means: Tensor
    real: RealSide | None


def matching_step(
    ctx: Context, nets: Adversaries, pool: Pool, step: int, batch: Batch
) -> tuple[dict[str, Tensor], Tensor]:
    """Do one step. Returns the scalars (the loss, its terms, the discriminator's), and the teachers' logits float32 [B, C]."""
    m, labels = ctx.config.matching, batch.labels

    # Generate. Without micro-batches, the discriminator uses the same forward.
    cuts = nets.micro_batches(len(labels))
    whole = nets.g(batch.z, labels) if len(cuts) == 1 else None

    # Train the discriminator.
    real, scalars, moved = None, dict[str, Tensor](), None
    if batch.real is not None:
        real = mirrored(ctx, batch.real)
        fake = nets.draw(batch.z, labels) if whole is None else whole
        through = augmentation(ctx, batch.real.d)
        scalars, moved = nets.train_discriminator(real, fake, labels, m.gamma, through, m.lr_d)

    parts, answers = [], []
    for i, p in enumerate(cuts):
        groups, means = batch.groups.part(i, len(cuts)), batch.means.chunk(len(cuts))[i]

        def total(
            images: Tensor, p: slice = p, groups: Groups = groups, means: Tensor = means
        ) -> tuple[Tensor, dict[str, Tensor]]:
            # Compare with the cache.
            logits, apart = pool.answer(images, labels[p], groups, batch.draws[p], batch.plain[p])
            answers.append(logits.detach())
            terms = {
                "pair": losses.PAIR[m.loss](batch.real_logits[p], logits, m.temperature),
                "mean": losses.mean_logit(means, logits.view(-1, groups.size, ctx.classes)),
            }
            # Add the terms.
            loss = m.lambda_pair * terms["pair"] + m.lambda_mean * terms["mean"]
            if apart is not None:
                terms["feature"] = apart
                loss = loss + m.lambda_feature * apart
            if m.lambda_label:
                terms["label"] = F.cross_entropy(logits, labels[p])
                loss = loss + m.lambda_label * terms["label"]
            if real is not None and batch.real is not None:
                through = augmentation(ctx, batch.real.g[p])
                terms["adv"] = nets.generator_loss(real[p], images, labels[p], through)
                loss = loss + m.lambda_adv * terms["adv"]
            return loss, terms

        parts.append(nets.generator_backward(nets.g(batch.z[p], labels[p]) if whole is None else whole, total))

    # Step.
    nets.step_generator(cosine(step, m.steps, m.lr, m.lr / 10), ema_decay(m.batch, m.ema_images), moved)
    return {**mean_scalars(parts), **scalars}, torch.cat(answers)


class Matching(loop.Trainee):
    """The networks in training, the measurements so far, and the best generator."""

    name = "matching"

    def __init__(self, ctx: Context, work: Path, pool: Pool, inputs: Inputs) -> None:
        gan, gan_dir = ctx.config.gan, inputs.directories["gan"]
        self._ctx, self._work, self._pool, self.steps = ctx, work, pool, ctx.config.matching.steps
        self._images = ctx.images("train")
        generator, self.meta = load_generator_network(inputs.directories[ctx.config.matching.start] / GENERATOR)
        if isinstance(generator, LinearGenerator):
            generator = MovedGaussian(generator)
        discriminator = load_discriminator_network(gan_dir / DISCRIMINATOR)
        self.nets = Adversaries(ctx, generator, discriminator, (gan.beta1, gan.beta2))
        self.nets.load_discriminator_state(gan_dir)
        self.skips = self.nets.skips
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Tensor] = {}
        if ctx.config.matching.start == "gaussian":  # its own step has measured it
            kept = chosen(inputs.directories["gaussian"])
            self.history.append({field: kept[field] for field in Measurement.__dataclass_fields__})
            self.best = cpu_state(self.nets.ema)

    def begin(self, start: int) -> None:
        """Open the monitor, and tell the loader which real images follow."""
        self.monitor = self._ctx.monitor("matching", self._work, self.steps, start=start)
        if self._ctx.config.matching.lambda_adv:
            self._images.expect(lambda step: self._groups(step).samples, start, self.steps)

    def _groups(self, step: int) -> Groups:
        return self._pool.dealer.batch(step, self._ctx.world.rank, self._ctx.world.size).by_teacher()

    def read(self, step: int) -> Batch:
        """Return the groups with cached logits, latents and random numbers, and the real images for the discriminator."""
        groups, m, seed = self._groups(step), self._ctx.config.matching, self._ctx.config.step_seed("matching")
        seed, slots, real = self.skips.seed(seed), groups.slots, None
        if m.lambda_adv:
            real = RealSide.drawn(self._images.read(groups.samples), seed, "matching", step, slots)
        batch = Batch(
            groups,
            torch.from_numpy(groups.labels),
            torch.from_numpy(normal(seed, "matching/z", step, slots, self.nets.generator.latent)),
            torch.from_numpy(uniform(seed, "matching/augment", step, slots, AUGMENT_DRAWS)),
            torch.from_numpy(groups.views == 0),
            self._pool.real_logits(groups),
            self._pool.class_means(groups),
            real,
        )
        return self._ctx.sent(batch)

    def train(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """Do one step; at intervals log histograms of the standardized logits of real and generated images, which matching makes alike."""
        scalars, answers = matching_step(self._ctx, self.nets, self._pool, step, batch)
        if self._ctx.world.is_main and (step % self._ctx.config.matching.interval == 0 or step == self.steps - 1):
            for side, logits in (("real", batch.real_logits), ("generated", answers)):
                values = losses.standardize(logits).cpu().numpy()
                self.monitor.histogram(f"teacher_answers/{side}", values, step)
        return scalars

    def before_step(self, step: int) -> None:
        """Measure at each interval and at the end; keep the best generator."""
        m = self._ctx.config.matching
        if step % m.interval and step != m.steps:
            return
        measured = self._measured(step)
        if self._ctx.on_interval is not None and self._ctx.world.is_main:
            self._ctx.on_interval(step, self.nets.ema, measured)

    def _measured(self, step: int) -> Measurement:
        """Measure quick students on val, once per interval."""
        if self.history and self.history[-1]["step"] == step:  # known, or an interruption removed its points
            found = Measurement(**self.history[-1])
            self.monitor.scalars(step, found.scalars())
            return found
        found = measure(self._ctx, self.nets.ema, step, self._ctx.config.step_seed("matching"))
        self.history.append(found.as_dict())
        if best(self.history, self._ctx.config.matching.select) is self.history[-1]:
            self.best = cpu_state(self.nets.ema)
        self.monitor.scalars(step, found.scalars())
        if self._ctx.world.is_main:
            self.monitor.picture("samples", sample_grid(self._ctx, self.nets.ema), step)
        self._ctx.world.say(
            f"matching: step {step}, quick students {found.val:.1f} ± {found.stderr:.1f} % on val, shortcut gap {found.gap:.1f}"
        )
        return found

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Losses and learning rate."""
        m = self._ctx.config.matching
        self.monitor.scalars(step, {**scalars, "lr": cosine(step, m.steps, m.lr, m.lr / 10)})

    def after_step(self, done: int) -> None:
        """Progress."""
        self.monitor.advance(done, images=self._ctx.config.matching.batch)

    def state_dict(self) -> dict[str, Any]:
        """Networks, measurements, the best generator."""
        return {"nets": self.nets.state_dict(), "history": self.history, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What ``state_dict`` gave."""
        self.nets.load_state_dict(state["nets"])
        self.history, self.best = state["history"], state["best"]

    def close(self) -> None:
        """Free the engines."""
        self.nets.close()

    def finish(self, work: Path, inputs: Inputs, candidates: Candidates) -> None:
        """Write the selected generator as one self-contained file; it is another candidate's if that was better on val than every interval."""
        self.monitor.close()
        if self._ctx.world.is_main:
            self.nets.ema.load_state_dict(self.best)
            net, meta, found = self.nets.ema, self.meta, candidates.kept(self._ctx.config.matching.select)
            if isinstance(net, MovedGaussian):
                net = net.folded()
                meta = {**meta, "arch": net.arch}
            if found and found[0] != INTERVAL:
                net, meta = load_generator_network(inputs.directories[found[0]] / GENERATOR)
                self._ctx.world.say(
                    f"matching: {found[0]} did better on val ({found[1]['val']:.1f} %) than any interval: it is kept"
                )
            about = {"provenance": inputs.provenance, "history": candidates.history, "others": candidates.others}
            save_network(work / GENERATOR, net, {**meta, **about})
        self.close()
