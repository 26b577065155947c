"""The matching step of DiM, for comparison: Wang et al., "DiM: Distilling Dataset into Generative Model", arXiv 2303.04707.

Written anew from what the reference does, https://github.com/vimar-gu/DiM at 3657339 (gan_model.py, and pool_match.py as its README
starts it: `--match logit --match-aug`, batch 64), for images of 32 pixels and three channels. Kept is all that costs time: the
networks, the order of forwards and backwards, gradients that nobody uses. Left out are data loading, logging and accuracies. The
classifier is one of ours, and so is the augmentation, whose operations are the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdd_dist.data.augment import AUGMENT_DRAWS, augment

NOISE, SIDE = 100, 32
CRITIC_STRIDES = (1, 2, 1, 2, 1, 1, 1, 2)
DOUBLES = (True, False, False, False, True, False, True)
"""Which of the generator's inner convolutions double the side, from 4 pixels to 32."""

Batch = tuple[Tensor, Tensor]
"""Float images [B, 3, 32, 32] in [-1, 1] and their labels, int64 [B]."""


def generator(width: int) -> nn.Sequential:
    """[B, NOISE] → images [B, 3, 32, 32] in [-1, 1]."""
    start = width * 4 * 4
    layers: list[nn.Module] = [
        nn.Linear(NOISE, start),
        nn.BatchNorm1d(start),
        nn.ReLU(),
        nn.Unflatten(1, (width, 4, 4)),
    ]
    for doubles in DOUBLES:
        up, same = nn.ConvTranspose2d(width, width, 4, 2, 1), nn.Conv2d(width, width, 3, padding=1)
        layers += [up if doubles else same, nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, 3, 3, padding=1), nn.Tanh())


class Critic(nn.Module):
    """The auxiliary-classifier discriminator: [B, 3, 32, 32] → scores [B, 1], logits [B, C]."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs, side = 3, SIDE
        for stride in CRITIC_STRIDES:
            side //= stride
            layers += [nn.Conv2d(inputs, width, 3, stride, 1), nn.LayerNorm([width, side, side]), nn.LeakyReLU()]
            inputs = width
        self.body = nn.Sequential(*layers, nn.MaxPool2d(4), nn.Flatten())
        self.score, self.label = nn.Linear(width, 1), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(images)
        return self.score(features), self.label(features)


class DiM:
    """Its networks and optimizers. ``following``: gives the next batch of real images; ``width``: channels of both GAN networks."""

    def __init__(
        self,
        classifier: nn.Module,
        classes: int,
        following: Callable[[], Batch],
        *,
        width: int = 196,
        iterations: int = 16,
    ) -> None:
        self.classifier, self._classes, self._following, self._iterations = classifier, classes, following, iterations
        self.generator, self.critic = generator(width), Critic(classes, width)
        adam = {"lr": 5e-6, "betas": (0.0, 0.9)}
        self._generator_step = torch.optim.Adam(self.generator.parameters(), **adam)
        self._critic_step = torch.optim.Adam(self.critic.parameters(), **adam)
        self._classifier_step = torch.optim.SGD(classifier.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def step(self) -> dict[str, float]:
        """One step of the generator, ``iterations`` of the classifier in the midst of it, one of the critic. Returns the losses."""
        real, labels = self._following()
        return {"loss_g": self._train_generator(real, labels), "loss_d": self._train_critic(real, labels)}

    def _train_generator(self, real: Tensor, labels: Tensor) -> float:
        self._generator_step.zero_grad()
        fake = self.generator(self._noise(labels))
        scores, logits = self.critic(fake)
        loss = F.cross_entropy(logits, labels) - scores.mean()
        for _ in range(self._iterations):
            self._train_classifier(*self._following())
        loss = loss + self._matching(real, fake)
        loss.backward()
        self._generator_step.step()
        return loss.item()

    def _train_classifier(self, images: Tensor, labels: Tensor) -> None:
        draws = torch.rand(len(images), AUGMENT_DRAWS)
        loss = F.cross_entropy(self.classifier(augment(images, draws, flip=False, fill=0.0, ops="color_crop")), labels)
        self._classifier_step.zero_grad()
        loss.backward()
        self._classifier_step.step()

    def _matching(self, real: Tensor, fake: Tensor) -> Tensor:
        """Of pairs that share a label, seen through one augmentation. The classifier's weights get gradients too, as there."""
        draws = torch.rand(1, AUGMENT_DRAWS).expand(2 * len(real), -1)
        seen = augment(torch.cat((real, fake)), draws, flip=False, fill=0.0)
        answers = [F.log_softmax(self.classifier(side), dim=1) for side in seen.chunk(2)]
        return (answers[0] - answers[1]).square().mean() * 0.01

    def _train_critic(self, real: Tensor, labels: Tensor) -> float:
        self._critic_step.zero_grad()
        drawn = torch.randint(self._classes, labels.shape)
        with torch.no_grad():
            fake = self.generator(self._noise(drawn))
        fake_scores, fake_logits = self.critic(fake)
        real_scores, real_logits = self.critic(real)
        loss = fake_scores.mean() - real_scores.mean() + self._penalty(real, fake)
        loss = loss + F.cross_entropy(fake_logits, drawn) + F.cross_entropy(real_logits, labels)
        loss.backward()
        self._critic_step.step()
        return loss.item()

    def _penalty(self, real: Tensor, fake: Tensor) -> Tensor:
        """Of WGAN-GP (Gulrajani et al. 2017), weight 10."""
        share = torch.rand(len(real), 1, 1, 1)
        between = (share * real + (1 - share) * fake).requires_grad_()
        (gradients,) = torch.autograd.grad(self.critic(between)[0].sum(), between, create_graph=True)
        return 10 * (gradients.flatten(1).norm(dim=1) - 1).square().mean()

    def _noise(self, labels: Tensor) -> Tensor:
        """Normal, with the label as a one-hot in the first numbers."""
        noise = torch.randn(len(labels), NOISE)
        noise[:, : self._classes] = F.one_hot(labels, self._classes).float()
        return noise
