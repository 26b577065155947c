"""Generator and discriminator compute the same, whichever way their numbers lie in memory."""

import copy

import torch

from gdd_dist.models.discriminator import Discriminator
from gdd_dist.models.files import cpu_state
from gdd_dist.models.generator import Generator
from gdd_dist.training import losses
from gdd_dist.training.adversaries import channels_last
from gdd_dist.training.optimizers import Adam

SHAPE = {"classes": 3, "channels": 3, "size": 16}


def trained(generator, discriminator):
    """Weights and images after a step with gradient penalties."""
    rng = torch.Generator().manual_seed(2)
    z, labels = torch.randn(4, 8, generator=rng), torch.tensor([0, 1, 2, 0])
    fake = generator(z, labels)
    images = fake.detach().requires_grad_()
    scores = discriminator(images, labels)
    (of_images,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    (scores.mean() + losses.zero_centred_penalty(of_images)).backward()
    fake.square().mean().backward()
    for net in (generator, discriminator):
        Adam(net.parameters(), lr=1e-3, betas=(0.9, 0.99), eps=1e-3, fused=True).step()
    return [fake.detach(), scores.detach(), *cpu_state(generator).values(), *cpu_state(discriminator).values()]


def test_channels_last_changes_no_number_and_no_file():
    torch.manual_seed(0)
    nets = Generator(**SHAPE, latent=8, width=16), Discriminator(**SHAPE, width=16)
    for p in (p for net in nets for p in net.parameters()):  # last layers start at zero
        torch.nn.init.normal_(p, std=0.2)
    others = copy.deepcopy(nets)
    channels_last(*others)
    turned = [p for net in others for p in net.parameters() if not p.is_contiguous()]
    assert turned
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in turned)
    assert all(w.is_contiguous() for net in others for w in cpu_state(net).values())  # as files want them
    for a, b in zip(trained(*nets), trained(*others), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
