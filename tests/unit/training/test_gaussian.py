"""The trivial generator: what is fitted, the same bits for any number of ranks, packing, inversion, memory."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.covariance import ledoit_wolf as sklearn_ledoit_wolf
from torch import Tensor

from gdd_dist.models import gaussian
from gdd_dist.models.gaussian import LinearGenerator, lower, pack, unpack
from gdd_dist.training.gaussian_fit import (
    Gaussians,
    Moments,
    ledoit_wolf,
    moments,
    most_components,
    shrunk_means,
)

Data = tuple[Tensor, Tensor]


def made_up(counts: Sequence[int], *, channels: int = 1, size: int = 8, seed: int = 0) -> Data:
    """Correlated pixels with a mean of its own for each class, uint8 [N, channels, size, size], and labels, shuffled."""
    rng = np.random.default_rng(seed)
    pixels = channels * size**2
    mix = rng.normal(size=(pixels, pixels)) * (0.9 ** np.arange(pixels))[:, None] * 12
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    means = 128 + 20 * rng.normal(size=(len(counts), pixels))
    scale = 1 + 0.3 * np.arange(len(counts))[labels, None] / len(counts)
    x = means[labels] + scale * (rng.normal(size=(len(labels), pixels)) @ mix)
    images = torch.from_numpy(x.round().clip(0, 255).astype(np.uint8)).view(-1, channels, size, size)
    return images, torch.from_numpy(labels)


def reader(data: Data, rows: int) -> Callable[[int], Data]:
    return lambda part: (data[0][part * rows : (part + 1) * rows], data[1][part * rows : (part + 1) * rows])


def fitted(data: Data, components: int, rows: int = 300, **options: Any) -> Moments:
    parts = range(-(-len(data[0]) // rows))
    classes = int(data[1].max()) + 1
    return moments(
        reader(data, rows), parts, pixels=data[0][0].numel(), classes=classes, components=components, **options
    )


def in_numpy(data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Pixels in [-1, 1], float64 [N, D], and labels."""
    return data[0].flatten(1).numpy() / 127.5 - 1, data[1].numpy()


def whole_covariance(net: LinearGenerator, y: int) -> np.ndarray:
    """Of what the generator draws before the clamp, in pixels, [D, D]."""
    root = unpack(net.roots[y].double(), net.places, net.latent).T @ net.basis.double()
    return (root.T @ root).numpy()


@pytest.mark.parametrize("channels", [1, 3])
def test_means_and_covariances_of_all_components_are_those_of_the_images(channels: int) -> None:
    data = made_up([400, 300, 250], channels=channels, size=4)
    x, labels = in_numpy(data)
    fit = Gaussians(fitted(data, 16 * channels))
    net = fit.generator(16 * channels, channels=channels, size=4, alpha=0.0, shrink_means=False)
    for y in range(3):
        mine = x[labels == y]
        drawn = net.mean + net.class_means[y] @ net.basis
        np.testing.assert_allclose(drawn.numpy(), mine.mean(0), atol=2e-5)
        np.testing.assert_allclose(whole_covariance(net, y), np.cov(mine.T), atol=1e-5)


def test_what_is_drawn_has_the_moments_of_the_class() -> None:
    data = made_up([2000, 2000], size=4)
    x, labels = in_numpy(data)
    net = Gaussians(fitted(data, 16)).generator(16, channels=1, size=4)
    z = torch.randn(20_000, 16, generator=torch.Generator().manual_seed(0))
    drawn = net.linear(z, torch.ones(20_000, dtype=torch.int64)).flatten(1).numpy()
    mine = x[labels == 1]
    assert abs(drawn.mean(0) - mine.mean(0)).max() < 0.02
    assert abs(np.cov(drawn.T) - np.cov(mine.T)).max() < 0.05 * np.cov(mine.T).max()


def test_few_components_are_the_principal_ones() -> None:
    data = made_up([500, 500], size=16)
    x, _ = in_numpy(data)
    best = np.linalg.eigvalsh(np.cov(x.T, bias=True))[::-1]
    variances = []
    for sketches in (1, 2):
        fit = Gaussians(fitted(data, 24, sketches=sketches))
        basis = fit.generator(24, channels=1, size=16).basis.double().numpy()
        np.testing.assert_allclose(basis @ basis.T, np.eye(24), atol=1e-6)
        variances.append(np.trace(basis @ np.cov(x.T, bias=True) @ basis.T))
        np.testing.assert_allclose(fit.variance[:24].sum(), variances[-1], rtol=1e-6)
        assert (basis[np.arange(24), abs(basis).argmax(1)] > 0).all()
    assert 0.99 * best[:24].sum() < variances[0] <= variances[1] <= best[:24].sum() * (1 + 1e-6)


def in_ranks(data: Data, components: int, world: int, rows: int) -> list[Moments]:
    """Threads that stand for ranks: each reads every world-th part, and sums meet at a barrier."""
    barrier, slots, out = threading.Barrier(world), [torch.empty(0)] * world, [None] * world
    parts = range(-(-len(data[0]) // rows))

    def rank(r: int) -> None:
        def add(tensor: Tensor) -> Tensor:
            slots[r] = tensor
            barrier.wait()
            total = torch.stack(slots[::-1]).sum(0)
            barrier.wait()
            return total

        shape = {"pixels": data[0][0].numel(), "classes": int(data[1].max()) + 1, "components": components}
        out[r] = moments(reader(data, rows), parts[r::world], **shape, add=add, lead=r == 0)  # type: ignore[call-overload]

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(world)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert None not in out
    return out  # type: ignore[return-value]


def test_ranks_cuts_and_threads_give_the_same_bits() -> None:
    data = made_up([300, 350, 1, 250], channels=3)
    alone = fitted(data, 20, rows=1000)
    expected = Gaussians(alone).generator(20, channels=3, size=8).state_dict()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = [m for world, rows in ((1, 70), (2, 128), (3, 100)) for m in in_ranks(data, 20, world, rows)]
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 6
    for sums in found:
        assert torch.equal(sums.second, alone.second)
        again = Gaussians(sums).generator(20, channels=3, size=8).state_dict()
        assert all(torch.equal(again[name], value) for name, value in expected.items())


def test_alpha_is_that_of_ledoit_and_wolf() -> None:
    rng = np.random.default_rng(0)
    for n in (5, 40, 400):
        x = rng.normal(size=(n, 30)) * 0.9 ** np.arange(30)
        x -= x.mean(0)
        covariance = torch.from_numpy(x.T @ x / (n - 1))
        target = covariance.trace() / 30 * torch.eye(30, dtype=torch.float64)
        fourth = float((x**2).sum(1).__pow__(2).sum())
        _, theirs = sklearn_ledoit_wolf(x, assume_centered=True)
        assert ledoit_wolf(fourth, n, covariance, target) == pytest.approx(min(1, theirs * n / (n - 2)), rel=1e-9)


def test_alpha_is_one_where_a_class_says_nothing_of_its_own() -> None:
    n, wide = 10, 2000  # far fewer images than axes: deviations are nearly orthogonal
    x = np.random.default_rng(0).normal(size=(n, wide))
    x -= x.mean(0)
    fourth = float(((x**2).sum(1) ** 2).sum())
    alpha = ledoit_wolf(fourth, n, torch.from_numpy(x.T @ x / (n - 1)), torch.eye(wide, dtype=torch.float64))
    assert 0.97 < alpha <= 1
    assert ledoit_wolf(1.0, 2, torch.eye(2), torch.zeros(2, 2)) == 1.0


def test_alpha_by_class_and_pooled_covariance_against_numpy() -> None:
    data = made_up([60, 200, 500], size=4)
    x, labels = in_numpy(data)
    fit = Gaussians(fitted(data, 16))
    deviations = [x[labels == y] - x[labels == y].mean(0) for y in range(3)]
    pooled = sum(d.T @ d for d in deviations) / (760 - 3)
    np.testing.assert_allclose(np.trace(pooled), fit.pooled.trace(), rtol=1e-6)
    for y, d in enumerate(deviations):
        n = len(d)
        own = d.T @ d / (n - 1)
        entries = np.einsum("ni,nj->nij", d, d)  # each entry's variance, summed the long way
        noise = entries.var(0).sum() * (n / (n - 1)) ** 2
        alpha = (1 - n / 760) * noise / (n - 2) / ((own - pooled) ** 2).sum()
        assert float(fit.alpha[y]) == pytest.approx(min(1, alpha), rel=1e-4)
        net = fit.generator(16, channels=1, size=4)
        a = min(1, alpha)
        np.testing.assert_allclose(whole_covariance(net, y), (1 - a) * own + a * pooled, atol=2e-5)


def test_means_move_by_how_noisy_they_are() -> None:
    rng = np.random.default_rng(0)
    truth, count = rng.normal(size=(200, 10)), np.tile([1, 4, 100, 0], 50)
    found = truth + rng.normal(size=truth.shape) * 3 / np.sqrt(np.maximum(count, 1))[:, None]
    shrunk = shrunk_means(torch.from_numpy(found), torch.from_numpy(count), 90.0).numpy()
    kept = shrunk[:, 0] / found[:, 0]
    np.testing.assert_allclose(kept[count == 100], 1 / (1 + 0.09), rtol=0.05)  # between classes: 10, noise: 90 / n
    np.testing.assert_allclose(kept[count == 1], 0.1, rtol=0.6)
    assert (shrunk[count == 0] == 0).all()
    there = count > 0
    assert ((shrunk - truth)[there] ** 2).mean() < 0.5 * ((found - truth)[there] ** 2).mean()


def test_classes_with_one_image_or_none_draw_with_the_spread_of_all() -> None:
    images, labels = made_up([200, 1, 200], size=4)
    sums = moments(lambda _: (images, labels), [0], pixels=16, classes=4, components=16)
    fit = Gaussians(sums)
    net = fit.generator(16, channels=1, size=4)
    assert all(torch.isfinite(b).all() for b in net.buffers())
    for y in (1, 3):
        np.testing.assert_allclose(
            whole_covariance(net, y), whole_covariance(fit.generator(16, channels=1, size=4, alpha=1.0), y)
        )
    assert not net.class_means[3].any()


def test_few_images_give_few_components() -> None:
    data = made_up([5, 4, 3], size=8)
    k = most_components(12, 3, 64)
    assert k == 9
    net = Gaussians(fitted(data, k)).generator(k, channels=1, size=8)
    drawn = net(torch.randn(30, k), torch.arange(30) % 3)
    assert torch.isfinite(drawn).all()
    assert drawn.std() > 0
    assert most_components(50_000, 10, 3072) == 256
    assert most_components(2, 2, 64) == 1


def test_one_image_a_class_is_drawn_as_it_is() -> None:
    images, labels = made_up([1, 1], size=4)
    k = most_components(2, 2, 16)
    net = Gaussians(fitted((images, labels), k)).generator(k, channels=1, size=4, shrink_means=False)
    torch.testing.assert_close(net(torch.randn(2, k), labels), images / 127.5 - 1, atol=1e-4, rtol=1e-4)


def test_constant_pixels_stay_constant() -> None:
    images, labels = made_up([100, 100], size=4)
    images[:, :, 0] = 7
    net = Gaussians(fitted((images, labels), 16)).generator(16, channels=1, size=4)
    drawn = net(torch.randn(50, 16), torch.arange(50) % 2)
    assert (drawn[:, :, 0] - (7 / 127.5 - 1)).abs().max() < 0.01


@pytest.mark.parametrize("side", [1, 2, 7])
def test_a_packed_triangle_comes_back(side: int) -> None:
    matrix = torch.randn(side, side).tril()
    packed = pack(matrix, lower(side))
    assert packed.shape == (side * (side + 1) // 2,)
    assert torch.equal(unpack(packed, lower(side), side), matrix)


def random_generator(dtype: str = "float32", spread: float = 1.0) -> LinearGenerator:
    torch.manual_seed(0)
    net = LinearGenerator(classes=4, channels=3, size=8, latent=12, spread=spread, dtype=dtype)
    net.mean.normal_(std=0.1)
    net.class_means.normal_(std=0.1)
    net.basis.copy_(torch.linalg.qr(torch.randn(192, 12))[0].T)
    for y in range(4):
        net.roots[y] = pack(torch.randn(12, 12).tril(-1) / 12 + torch.eye(12), net.places)
    return net


@pytest.mark.parametrize(("dtype", "near"), [("float32", 1e-5), ("float16", 5e-3)])
def test_the_formula_and_its_inverse(dtype: str, near: float) -> None:
    net, exact = random_generator(dtype, spread=0.8), random_generator(spread=0.8)
    z, y = torch.randn(9, 12), torch.tensor([3, 0, 0, 1, 3, 3, 0, 1, 0])
    rows = []
    for latent, label in zip(z, y.tolist(), strict=True):
        root = unpack(exact.roots[label], exact.places, 12)
        rows.append(exact.mean + exact.basis.T @ (exact.class_means[label] + 0.8 * root @ latent))
    drawn = net.linear(z, y)
    torch.testing.assert_close(drawn.flatten(1), torch.stack(rows), atol=near, rtol=near)
    torch.testing.assert_close(net.latents(drawn, y), z, atol=near, rtol=near)
    other = torch.randn(9, 3, 8, 8)
    torch.testing.assert_close(
        net.linear(net.latents(other, y), y).flatten(1),
        net.mean + (other.flatten(1) - net.mean) @ net.basis.float().T @ net.basis.float(),
        atol=10 * near,
        rtol=near,
    )


@pytest.mark.parametrize("at_once", [64, 3, 1])
def test_what_a_gpu_computes_is_what_a_cpu_computes(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """A GPU asks every root for every row, so that the host need not know how many rows a class has."""
    monkeypatch.setattr(gaussian, "CLASSES_AT_ONCE", at_once)
    net, z, y = random_generator(), torch.randn(9, 12), torch.tensor([3, 0, 0, 1, 3, 3, 0, 1, 0])
    images = torch.randn(9, 3, 8, 8)
    expected = net.linear(z, y), net.latents(images, y)
    monkeypatch.setattr(gaussian, "_sorted", gaussian._chosen)
    for found, sought in zip((net.linear(z, y), net.latents(images, y)), expected, strict=True):
        torch.testing.assert_close(found, sought, atol=1e-5, rtol=1e-5)
    assert net.linear(z[:0], y[:0]).shape == (0, 3, 8, 8)


def test_images_are_clamped_and_float32_under_autocast() -> None:
    net = random_generator()
    z, y = 40 * torch.randn(6, 12), torch.arange(6) % 4
    plain = net(z, y)
    assert plain.abs().max() == 1
    assert plain.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(net(z.bfloat16().float(), y), net(z.bfloat16(), y))
        assert torch.equal(net(z, y), plain)
        assert torch.equal(net.latents(plain, y), net.latents(plain, y).float())
    assert net(z[:0], y[:0]).shape == (0, 3, 8, 8)
    gradient = torch.autograd.grad(net.linear(z.requires_grad_(), y).square().sum(), z)[0]
    assert gradient.abs().min() > 0


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_file_and_its_arch_rebuild_it(tmp_path: Path, dtype: str) -> None:
    net = random_generator(dtype, spread=0.9)
    assert not list(net.parameters())
    save_file(net.state_dict(), tmp_path / "g.safetensors", metadata={"arch": json.dumps(net.arch)})
    again = LinearGenerator(**json.loads(json.dumps(net.arch)))
    again.load_state_dict(load_file(tmp_path / "g.safetensors"))
    z, y = torch.randn(5, 12), torch.arange(5) % 4
    assert torch.equal(again(z, y), net(z, y))
    assert again.roots.dtype == getattr(torch, dtype)


MEMORY = """
import torch
def peak():  # getrusage would give the parent's, from before exec
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
from gdd_dist.training.gaussian_fit import Gaussians, moments
torch.set_num_threads(1)
before = peak()
def read(part):
    g = torch.Generator().manual_seed(part)
    return torch.randint(256, (1024, 3, 64, 64), generator=g, dtype=torch.uint8), torch.arange(1024) % 200
sums = moments(read, range(2), pixels=12288, classes=200, components=256)
net = Gaussians(sums).generator(256, channels=3, size=64)
net(torch.randn(64, 256), torch.arange(64))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_200_classes_of_64_pixels_take_less_than_400_megabytes() -> None:
    # A matrix [D, D] alone would have 1.2 GB. What importing torch takes, 0.7 GB where it comes with CUDA, is not counted.
    out = subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True).stdout
    assert 0 < 1024 * int(out) < 400e6
