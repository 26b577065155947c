"""From the same artifacts any number of ranks computes the same losses, each rank its share and no more (design 5.3)."""

import functools

import hooks
import numpy as np
import pytest
import ranks
from events import scalars

FIRST = 12


def losses(out, step, *names):
    """The first points of each loss, float64 [names, steps]."""
    found = scalars(out / "tensorboard" / step)
    return np.array([[found[f"{step}/{name}"][i] for i in range(FIRST)] for name in names])


def forwards(folder, size):
    """Images that each rank forwarded in each step, int64 [ranks, steps]."""
    return np.array([[int(n) for n in (folder / f"forwards-{r}").read_text().split()] for r in range(size)])


@pytest.mark.parametrize("size", [1, 2, 8])
def test_matching_losses_agree_and_each_rank_forwards_its_share(undisturbed, tmp_path, size):
    store = undisturbed.copy(tmp_path / "store", "teachers", "logits", "gaussian", "gan")
    argv = [*undisturbed.argv, "--store", str(store)]
    count = functools.partial(hooks.count_forwards, step="matching", folder=tmp_path)
    found = ranks.train(tmp_path / "out", argv, size, before=count)
    assert found["gan"]["status"] == "reused"
    expected = losses(undisturbed.out, "matching", "loss", "loss_d")
    assert np.allclose(losses(tmp_path / "out", "matching", "loss", "loss_d"), expected, rtol=1e-4, atol=0)
    assert (forwards(tmp_path, size) * size == share_of_matching(undisturbed)).all()


def share_of_matching(run):
    """Images that a step forwards on all ranks: generator, discriminator on both sides twice over, one teacher a slot."""
    batch = 16
    return batch * (1 + 2 + 2 + 1)


@pytest.mark.parametrize("size", [1, 2])
def test_gan_losses_agree_and_each_rank_forwards_its_share(undisturbed, tmp_path, size):
    store = undisturbed.copy(tmp_path / "store", "teachers", "logits")
    count = functools.partial(hooks.count_forwards, step="gan", folder=tmp_path)
    argv = [*undisturbed.argv, "--store", str(store), "--until", "gan"]
    ranks.train(tmp_path / "out", argv, size, before=count)
    expected = losses(undisturbed.out, "gan", "loss_g", "loss_d")
    assert np.allclose(losses(tmp_path / "out", "gan", "loss_g", "loss_d"), expected, rtol=1e-4, atol=0)
    each = forwards(tmp_path, size)
    assert (each == each[0, 0]).all()
    assert each[0, 0] * size == 16 * (2 + 2 + 2)


def test_teachers_are_the_same_whoever_trains_them(undisturbed, reported):
    """One process and four ranks gave the pool, and its logits, the same bytes."""
    for step in ("teachers", "logits"):
        one, four = ((run.out / step / run.steps[step]["fingerprint"]) for run in (reported, undisturbed))
        names = sorted(p.relative_to(one) for p in one.rglob("*.npy")) + sorted(
            p.relative_to(one) for p in one.rglob("*.safetensors")
        )
        assert names
        for name in names:
            assert ranks.weights(one / name) == ranks.weights(four / name), name
