"""A compiled network computes what it computes uncompiled. The backend is the one that compiles nothing for a machine."""

import copy

import torch

from gdd_dist.engines import compiled as module
from gdd_dist.engines.compiled import compiled
from gdd_dist.engines.precision import autocast
from gdd_dist.models.classifiers import build_classifier
from gdd_dist.models.generator import Generator


def answers(generator, classifier, precision):
    """Logits of drawn images, and the gradients of both networks' weights."""
    z, labels = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 0])
    with autocast(z.device, precision):
        logits = classifier(generator(z, labels).float()).float()
    weights = [*generator.parameters(), *classifier.parameters()]
    return [logits.detach(), *torch.autograd.grad(logits.square().sum(), weights, allow_unused=True)]


def test_generator_and_classifiers_compute_the_same_compiled(monkeypatch):
    monkeypatch.setattr(module, "BACKEND", "aot_eager")
    torch.manual_seed(0)
    generator = Generator(classes=3, channels=1, size=8, latent=8, width=8)
    classifier = build_classifier("convnet:8", channels=1, size=8, classes=3, mean=[0.0], std=[1.0])
    called = []
    own = [compiled(copy.deepcopy(net)) for net in (generator, classifier)]
    own[0].register_forward_pre_hook(lambda net, inputs: called.append(len(inputs[0])))
    from torch._dynamo.utils import counters

    for precision in ("float32", "bf16"):
        expected = answers(generator, classifier, precision)
        for _ in range(2):
            for a, b in zip(answers(*own, precision), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert called == [4] * 4  # images are counted outside
    assert counters["stats"]["unique_graphs"] >= 4
    assert not counters["graph_break"]
    assert own[0].state_dict().keys() == generator.state_dict().keys()
