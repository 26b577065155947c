"""The formulas, as pure functions. Every one computes in float32 whatever the dtype of its arguments.

Shapes: B pairs, C classes, G groups, n members of a group.
"""

import torch.nn.functional as F
from torch import Tensor

_EPSILON = 1e-7


def standardize(logits: Tensor) -> Tensor:
    """Z-score of each sample's logits over its classes, [..., C] -> [..., C], unbiased std (Sun et al. 2024)."""
    logits = logits.float()
    return (logits - logits.mean(-1, keepdim=True)) / (logits.std(-1, keepdim=True) + _EPSILON)


def kd(real_logits: Tensor, fake_logits: Tensor, temperature: float) -> Tensor:
    """t^2 KL(softmax(real/t) || softmax(fake/t)) of [B, C] each, mean over pairs (Hinton et al. 2015)."""
    log_p = F.log_softmax(real_logits.float() / temperature, -1)
    log_q = F.log_softmax(fake_logits.float() / temperature, -1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def skd(real_logits: Tensor, fake_logits: Tensor, temperature: float) -> Tensor:
    """`kd` of standardized logits: blind to shift and scale of either side. [B, C] each, rows share a label."""
    return kd(standardize(real_logits), standardize(fake_logits), temperature)


def dim(real_logits: Tensor, fake_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over pairs and classes of the squared difference of log-softmax outputs, [B, C] each (DiM); it has no temperature."""
    return (F.log_softmax(real_logits.float(), -1) - F.log_softmax(fake_logits.float(), -1)).square().mean()


PAIR = {"skd": skd, "kd": kd, "dim": dim}
"""The pair losses by name: (real logits [B, C], generated [B, C], temperature) → scalar."""


def mean_logit(class_mean: Tensor, fake_logits: Tensor) -> Tensor:
    """Squared distance of class means [G, C] and group means of raw logits [G, n, C]; mean over groups.

    A mean of n draws misses its expectation by variance/n even when the generator is right, so the group's unbiased
    variance over n is subtracted (not for n = 1, where it is unknown). The estimate is unbiased and can be negative.
    """
    fake_logits = fake_logits.float()
    distance = (class_mean.float() - fake_logits.mean(1)).square()
    if (n := fake_logits.shape[1]) > 1:
        distance = distance - fake_logits.var(1) / n
    return distance.sum(-1).mean()


def mean_feature(class_mean: Tensor, fake_features: Tensor, variance: Tensor) -> Tensor:
    """`mean_logit` of features, [G, F] and [G, n, F], as a share of their total ``variance`` within classes: mean over groups."""
    return mean_logit(class_mean, fake_features) / variance


def relativistic_discriminator(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """Mean softplus(-(D(real) - D(fake))) over pairs that share a class (R3GAN, Huang et al. 2024). [B] each."""
    return F.softplus(fake_scores.float() - real_scores.float()).mean()


def relativistic_generator(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """The mirror: mean softplus(-(D(fake) - D(real))) over pairs that share a class. [B] each."""
    return F.softplus(real_scores.float() - fake_scores.float()).mean()


def zero_centred_penalty(gradients: Tensor) -> Tensor:
    """Mean over the batch of ||gradient||^2, [B, ...], summed over pixels. The caller multiplies by gamma / 2."""
    return gradients.float().flatten(1).square().sum(1).mean()
