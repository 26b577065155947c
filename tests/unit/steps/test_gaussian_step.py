"""The step gaussian: chosen on val, one file for any number of ranks; matching never ends below it on val."""

import functools
import json
import shutil
import signal

import hooks
import pytest
import ranks

from gdd_dist.models.files import load_generator_network, read_network
from gdd_dist.models.gaussian import LinearGenerator
from gdd_dist.models.residual_generator import ResidualGenerator
from gdd_dist.training.gaussian_fit import chosen

CHOICES = ["--gaussian.components", "4", "8", "--gaussian.spread", "0.5", "1.0"]

STARTS = ["--gan.start", "gaussian"]


def generator(out, step):
    return out / step / "latest" / "generator.safetensors"


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """One process, up to matching; the generator starts at the Gaussian."""
    out = tmp_path_factory.mktemp("gaussian") / "out"
    ended = ranks.start(out, [*tiny, *CHOICES, *STARTS, "--until", "matching"]).wait()
    assert ended.codes == [0], ended.text
    return out


def test_the_best_candidate_on_val_is_kept(alone):
    directory = alone / "gaussian" / "latest"
    found = json.loads((directory / "choice.json").read_text())["candidates"]
    assert [(c["components"], c["spread"]) for c in found] == [(4, 0.5), (4, 1.0), (8, 0.5), (8, 1.0)]
    net, meta = load_generator_network(directory / "generator.safetensors")
    assert isinstance(net, LinearGenerator)
    best = max(found, key=lambda c: c["val"])
    assert chosen(directory) == best
    assert (net.latent, net.arch["spread"]) == (best["components"], best["spread"])
    assert meta["provenance"]["fingerprints"]["shards"]


def test_any_number_of_ranks_fits_the_same_bits(alone, tiny, tmp_path):
    best = chosen(alone / "gaussian" / "latest")
    argv = ["--gaussian.components", str(best["components"]), "--gaussian.spread", str(best["spread"])]
    ranks.train(tmp_path / "out", [*tiny, *argv, "--until", "gaussian"], 2)
    assert ranks.weights(generator(tmp_path / "out", "gaussian")) == ranks.weights(generator(alone, "gaussian"))


def test_the_gan_starts_there_and_its_linear_part_is_not_moved(alone):
    net, _ = load_generator_network(generator(alone, "gan"))
    assert isinstance(net, ResidualGenerator)
    weights = read_network(generator(alone, "gaussian"))[0]
    for name, value in net.linear.state_dict().items():
        assert value.equal(weights[name]), name


def test_matching_keeps_the_best_on_val_of_its_intervals_and_of_those_that_it_does_not_train(alone):
    net, meta = load_generator_network(generator(alone, "matching"))
    assert meta["others"].keys() == {"gaussian"}
    beside, best = max(o["val"] for o in meta["others"].values()), max(h["val"] for h in meta["history"])
    assert isinstance(net, LinearGenerator if beside > best else ResidualGenerator)


MOVES = [
    "--matching.start",
    "gaussian",
    "--matching.lambda_label",
    "0.1",
    "--matching.lambda_feature",
    "1",
    "--matching.lr",
    "1e-3",
]


@pytest.fixture(scope="module")
def moved(alone, tiny, tmp_path_factory):
    """Two processes, one of which is killed in the middle of matching, and which then start again."""
    folder = tmp_path_factory.mktemp("moved")
    argv = [*tiny, *CHOICES, *STARTS, *MOVES, "--matching.select", "last", "--until", "matching", "--store", str(alone)]
    found = {}
    for name in ("undisturbed", "killed"):
        out = folder / name
        if name == "killed":
            argv = [*argv[:-1], str(shutil.copytree(alone, folder / "store", symlinks=True))]
            shutil.rmtree(folder / "store" / "matching")
            hook = functools.partial(hooks.die_in_matching, victim=1, step=8)
            job = ranks.start(out, argv, 2, before=hook)
            job.until(lambda job=job: any(p.exitcode == -signal.SIGKILL for p in job.processes))
            job.wait_as_torchrun()
        ranks.train(out, argv, 2)
        found[name] = out
    return found


def test_matching_can_move_the_gaussians_themselves(alone, moved):
    net, meta = load_generator_network(generator(moved["undisturbed"], "matching"))
    before, _ = load_generator_network(generator(alone, "gaussian"))
    assert isinstance(net, LinearGenerator)
    assert not net.class_means.equal(before.class_means)
    assert not net.roots.equal(before.roots)
    assert net.basis.equal(before.basis)
    assert (
        meta["others"] == {}
    )  # nothing but its intervals, the first of which is the Gaussian as its own step measured it
    kept = chosen(alone / "gaussian" / "latest")
    assert meta["history"][0] == {name: kept[name] for name in ("step", "val", "stderr", "gap")}
    assert [one["step"] for one in meta["history"]] == [0, 6, 12]


def test_moved_gaussians_go_on_exactly_after_a_kill(moved):
    one, two = (ranks.weights(generator(moved[name], "matching")) for name in ("undisturbed", "killed"))
    assert one == two
