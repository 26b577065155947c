"""A step that is replayed trains as one that is not. No GPU is asked: a tape stands in for CUDA's graph."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gdd_dist.engines.captured import WARM, Captured
from gdd_dist.models.classifiers import build_classifier
from gdd_dist.training.classifier_fit import sgd, train_step
from gdd_dist.training.context import Context


class Tape(TorchDispatchMode):
    """Records operations with the tensors that they read and write, and, as a capture, leaves the latter as they were."""

    def __init__(self):
        super().__init__()
        self.replays, self._calls, self._before = 0, [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        named = zip(func._schema.arguments, [*args, *kwargs.values()], strict=False)
        for written in tree_leaves([value for argument, value in named if argument.is_write]):
            if isinstance(written, torch.Tensor):
                self._before.setdefault(written.untyped_storage().data_ptr(), (written, written.clone()))
        result = func(*args, **kwargs)
        self._calls.append((func, args, kwargs, result))
        return result

    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor, value in self._before.values():
            tensor.detach().copy_(value)

    @torch.no_grad()
    def replay(self):
        """The same operations on the same tensors, whatever is in them now."""
        self.replays += 1
        for func, args, kwargs, recorded in self._calls:
            for new, old in zip(tree_leaves(func(*args, **kwargs)), tree_leaves(recorded), strict=True):
                if (
                    isinstance(old, torch.Tensor)
                    and new.untyped_storage().data_ptr() != old.untyped_storage().data_ptr()
                ):
                    old.detach().copy_(new)


@pytest.fixture
def tapes(monkeypatch):
    """The tapes that stand in for the graphs which are made."""
    made = []
    stream = SimpleNamespace(wait_stream=lambda other: None)

    def graph():
        made.append(Tape())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda tape, **_: tape)
    return made


def student(precision):
    """A network, and its step."""
    torch.manual_seed(0)
    net = build_classifier("convnet:8", channels=1, size=16, classes=3, mean=[0.0], std=[1.0])
    return net, partial(train_step, net, sgd(net, 0.1, 0.9, 5e-4), lr=0.1, precision=precision)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("soft", [False, True])
def test_replayed_steps_move_the_weights_as_steps_do(tapes, precision, soft):
    """Batches of two sizes, in turn; one is not finite and moves nothing."""
    (plain, expected), (net, step) = student(precision), student(precision)
    found = Captured(step)
    for k in range(4 * WARM):
        n = (6, 4)[k % 2]
        x, y = torch.randn(n, 1, 16, 16), torch.randint(3, (n,))
        if k == 2 * WARM + 2:
            x[0] = float("nan")
        y = torch.nn.functional.one_hot(y, 3).float() if soft else y
        assert bool(found(x, y)) == bool(expected(x, y)) == (k != 2 * WARM + 2)
        for one, other in zip(net.parameters(), plain.parameters(), strict=True):
            assert torch.equal(one, other)
    assert [tape.replays for tape in tapes] == [WARM, WARM]


def test_it_is_what_a_run_that_compiles_does_on_a_gpu_and_each_image_is_counted(tapes):
    net, step = student("float32")
    ctx = SimpleNamespace(config=SimpleNamespace(compile=True), device=torch.device("cuda"), forwards=0)
    net.register_forward_pre_hook(partial(count, ctx))
    found = Context.captured(ctx, step)
    for _ in range(WARM + 2):
        found(torch.randn(6, 1, 16, 16), torch.randint(3, (6,)))
    assert ctx.forwards == 6 * (WARM + 2)
    assert tapes[0].replays == 2
    ctx.device = torch.device("cpu")
    assert Context.captured(ctx, step) is step
    ctx.device, ctx.config.compile = torch.device("cuda"), False
    assert Context.captured(ctx, step) is step


def count(ctx, _net, inputs):
    """As `Context.watch` does."""
    ctx.forwards += len(inputs[0])
