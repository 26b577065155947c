"""gdd_dist.load_generator: what a user draws in their own code, from a run directory or from one file."""

from __future__ import annotations

import copy
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_runs import Made, make
from safetensors.torch import save_file

import gdd_dist
from gdd_dist.models.files import read_network, save_network
from gdd_dist.product import sampler
from gdd_dist.product.sampler import Sampler, truncated
from sharding.errors import UserError


@pytest.fixture(scope="module")
def made(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("sampler") / "out", digits)


@pytest.fixture(scope="module")
def generator(made: Made) -> Sampler:
    return gdd_dist.load_generator(made.out, "cpu")


@pytest.fixture(scope="module")
def bare(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file alone, far from its run."""
    return Path(
        shutil.copy(made.dirs["matching"] / "generator.safetensors", tmp_path_factory.mktemp("bare") / "g.safetensors")
    )


def test_sample_gives_8_bit_images_of_the_asked_classes_by_seed(generator: Sampler) -> None:
    labels = [3, 1, 4, 1, 5]
    images = generator.sample(labels, seed=7)
    assert images.dtype == torch.uint8
    assert images.shape == (5, 1, 16, 16)
    assert torch.equal(images, generator.sample(torch.tensor(labels), seed=7))
    assert torch.equal(images, generator.sample(np.array(labels), seed=7))
    assert not torch.equal(images, generator.sample(labels, seed=8))
    assert not torch.equal(images[1], images[3])
    assert generator.sample([]).shape == (0, 1, 16, 16)
    assert generator.classes == tuple(map(str, range(10)))


def test_another_class_from_the_same_latent_is_another_image(generator: Sampler) -> None:
    assert not torch.equal(generator.sample([0]), generator.sample([1]))


def test_run_directory_step_directory_and_single_file_draw_the_same(made: Made, generator: Sampler, bare: Path) -> None:
    expected = generator.sample(range(10))
    for path in (bare, made.dirs["matching"], str(made.out / "matching" / "latest")):
        assert torch.equal(gdd_dist.load_generator(path, "cpu").sample(range(10)), expected)


def test_truncation_cuts_latents_by_rank_and_keeps_their_order() -> None:
    z = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    cut = truncated(z, 0.5)
    assert float(cut.abs().max()) <= 0.5
    assert torch.equal(cut.argsort(), z.argsort())
    # Evenly ranked in the cut normal distribution: its quartiles are at ± Φ⁻¹(1/2 + Φ(0.5)/2 - 1/4), about ± 0.244.
    assert float(cut.quantile(0.75)) == pytest.approx(0.244, abs=0.02)
    assert torch.equal(truncated(z, None), z)
    assert torch.allclose(truncated(z, 30.0), z, atol=1e-4)


def test_truncation_brings_images_together(generator: Sampler) -> None:
    spread = [generator.sample([0] * 50, truncation=t).float().std(0).mean() for t in (0.1, 1.0, None)]
    assert spread[0] < spread[1] < spread[2]


def test_a_dataset_holds_ipc_images_of_each_class_and_a_larger_one_the_smaller(generator: Sampler) -> None:
    small, large = generator.dataset(2, seed=3), generator.dataset(5, seed=3)
    assert [len(small), len(large)] == [20, 50]
    assert np.bincount([y for _, y in small]).tolist() == [2] * 10
    image, label = small[0]
    assert (image.dtype, image.shape, label) == (torch.uint8, (1, 16, 16), 0)
    for c in range(10):
        ours, theirs = small.images[small.labels == c].int(), large.images[large.labels == c][:2].int()
        assert int((ours - theirs).abs().max()) <= 1
    doubled = generator.dataset(2, seed=3, transform=lambda x: x.float() * 2)
    assert torch.equal(doubled[4][0], image.float() * 2) or torch.equal(doubled[0][0], image.float() * 2)
    batch, labels = next(iter(torch.utils.data.DataLoader(small, batch_size=4)))
    assert (batch.shape, labels.dtype) == ((4, 1, 16, 16), torch.int64)


def test_soft_labels_are_the_mean_of_the_last_teachers(made: Made, generator: Sampler) -> None:
    soft = generator.dataset(1, soft_labels=True)
    assert soft.soft is not None
    assert soft.soft.shape == (10, 10)
    assert torch.allclose(soft.soft.sum(1), torch.ones(10))
    from gdd_dist.models.files import read_teachers

    x = soft.images.float() / 127.5 - 1
    last = [t.load(1, 16, 10) for t in read_teachers(made.dirs["teachers"]) if t.last]
    expected = sum((net(x) / 1.0).softmax(1) for net in last) / len(last)
    assert torch.allclose(soft.soft, expected, atol=1e-5)
    assert torch.allclose(generator.soft_labels(x), soft.soft, atol=1e-5)
    assert not torch.allclose(generator.soft_labels(x, temperature=5.0), soft.soft, atol=1e-3)


def test_the_label_temperature_is_the_runs(digits: Path, tmp_path: Path) -> None:
    made = make(tmp_path / "out", digits)
    config = made.out / "config.yaml"
    config.write_text(config.read_text().replace("label_temperature: 1.0", "label_temperature: 2.5"))
    assert gdd_dist.load_generator(made.out, "cpu").label_temperature() == 2.5


def test_a_stream_never_ends_deals_classes_evenly_and_starts_alike(generator: Sampler) -> None:
    first = list(itertools.islice(generator.stream(20, seed=1), 3))
    again = list(itertools.islice(generator.stream(20, seed=1), 3))
    for (x, y), (x2, y2) in zip(first, again, strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
        assert np.bincount(y.numpy()).tolist() == [2] * 10
    assert not torch.equal(first[0][0], first[1][0])
    x, soft = next(generator.stream(5, soft_labels=True))
    assert soft.shape == (5, 10)
    assert torch.allclose(soft, generator.soft_labels(x))


def test_a_choice_shows_each_places_best_draw_whose_first_is_the_plain_one(generator: Sampler, bare: Path) -> None:
    plain, labels = next(generator.stream(40, seed=1))
    chosen, same = next(generator.stream(40, seed=1, select=3))
    assert torch.equal(labels, same)

    def shares(images: torch.Tensor) -> torch.Tensor:
        return generator.soft_labels(images, 1.0)[torch.arange(len(images)), labels]

    assert (shares(chosen) >= shares(plain) - 1e-6).all()
    kept = (chosen == plain).flatten(1).all(1)
    assert 0 < int(kept.sum()) < 40
    sets = [generator.dataset(2, select=n) for n in (1, 3)]
    assert torch.equal(sets[0].labels, sets[1].labels)
    assert not torch.equal(sets[0].images, sets[1].images)
    with pytest.raises(UserError, match="select > 1 need the run's teachers"):
        gdd_dist.load_generator(bare, "cpu").stream(4, select=3)


def test_a_stream_is_drawn_on_the_generators_device(made: Made) -> None:
    """The meta device computes nothing, and refuses whatever lies elsewhere."""
    generator = gdd_dist.load_generator(made.out, "meta")
    for soft in (False, True):
        images, targets = next(generator.stream(4, soft_labels=soft))
        assert (images.device.type, targets.device.type) == ("meta", "meta")
        assert (images.shape, targets.shape) == ((4, 1, 16, 16), (4, 10) if soft else (4,))


def test_soft_labels_of_a_single_file_are_one_line_that_says_what_to_give(bare: Path) -> None:
    alone = gdd_dist.load_generator(bare, "cpu")
    for ask in (
        lambda: alone.dataset(1, soft_labels=True),
        lambda: alone.stream(4, soft_labels=True),
        lambda: alone.soft_labels(alone.sample([0])),
    ):
        with pytest.raises(UserError, match=r"give load_generator the run directory") as e:
            ask()
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda g: g.sample([10]), "give class numbers 0 … 9"),
        (lambda g: g.sample([-1]), "give class numbers 0 … 9"),
        (lambda g: g.sample([0.5]), "give a list of class numbers"),
        (lambda g: g.sample([0], truncation=0.0), "truncation 0.0 is not positive"),
        (lambda g: g.dataset(0), "ipc 0 is too small"),
        (lambda g: g.stream(0), "batch_size 0 is too small"),
        (lambda g: g.dataset(1, select=0), "select 0 is too small"),
        (lambda g: g.stream(4, select=0), "select 0 is too small"),
    ],
)
def test_wrong_calls_say_what_to_give(generator: Sampler, call, said: str) -> None:
    with pytest.raises(UserError, match=said):
        call(generator)


def test_what_is_no_generator_is_refused(made: Made, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing", made.dirs["teachers"] / "teacher-000.safetensors"):
        with pytest.raises(UserError, match=r"give (a run directory|the generator)"):
            gdd_dist.load_generator(path, "cpu")


def test_damage_is_found_before_anything_is_drawn(digits: Path, tmp_path: Path) -> None:
    made = make(tmp_path / "out", digits)
    for path in (made.dirs["teachers"] / "teacher-001.safetensors", made.dirs["matching"] / "generator.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{path.name} is damaged"):
            gdd_dist.load_generator(made.out, "cpu").dataset(1, soft_labels=True)


BLOCKED = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        if root in {blocked}:
            raise ImportError(f"{{root}} is blocked")

sys.meta_path.insert(0, Block())
import gdd_dist
generator = gdd_dist.load_generator({file!r}, "cpu")
images = generator.sample(range(10), seed=0)
data = generator.dataset(ipc=2)
batch, labels = next(generator.stream(4))
assert images.shape == (10, 1, 16, 16) and len(data) == 20 and len(batch) == 4
for name in {blocked}:
    assert name not in sys.modules
print(int(images.sum()))
"""


def test_a_single_file_needs_torch_numpy_and_safetensors_alone(generator: Sampler, bare: Path) -> None:
    """All else that this environment holds, torch's own needs aside, is blocked in a process of its own."""
    from importlib.metadata import packages_distributions, requires

    def needs(name: str) -> set[str]:
        found, todo = set(), [name]
        while todo:
            one = todo.pop().lower().replace("_", "-")
            if one not in found:
                found.add(one)
                lines = [r for r in requires_or_none(one) if "extra ==" not in r]
                todo += ["".join(c if c.isalnum() or c in "-_." else " " for c in line).split()[0] for line in lines]
        return found

    def requires_or_none(name: str) -> list[str]:
        try:
            return requires(name) or []
        except Exception:  # a need of another platform
            return []

    kept = needs("torch") | needs("numpy") | needs("safetensors") | {"gdd-dist"}
    blocked = {
        module
        for module, owners in packages_distributions().items()
        if not any(o.lower().replace("_", "-") in kept for o in owners) and module.isidentifier()
    } - {"gdd_dist", "sharding", "tune"}
    assert {"PIL", "torchvision", "webdataset", "jsonargparse", "yaml", "tensorboard", "simplejpeg", "tqdm"} <= blocked
    script = BLOCKED.format(blocked=sorted(blocked), file=str(bare))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == int(generator.sample(range(10), seed=0).sum())


class Stream(torch.utils.data.IterableDataset[torch.Tensor]):
    def __init__(self, generator: Sampler, batches: int) -> None:
        self.generator, self.batches = generator, batches

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (images for images, _ in itertools.islice(self.generator.stream(4), self.batches))


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_the_workers_of_a_dataloader_give_the_stream_together_and_no_batch_twice(
    generator: Sampler, workers: int
) -> None:
    each = 6 // max(workers, 1)
    loader = torch.utils.data.DataLoader(Stream(generator, each), batch_size=None, num_workers=workers)
    expected = [images for images, _ in itertools.islice(generator.stream(4), 6)]
    assert torch.equal(torch.stack(list(loader)), torch.stack(expected))


@pytest.mark.parametrize("content", ["text", "foreign", "format", "torn"])
def test_a_wrong_file_is_named_and_nobody_is_told_to_remove_what_is_his(
    bare: Path, tmp_path: Path, content: str
) -> None:
    file = tmp_path / "mine.safetensors"
    if content == "text":
        file.write_text("not a network")
    elif content == "torn":
        file.write_bytes(bare.read_bytes()[:-100])
    else:  # Hugging Face writes {"format": "pt"}
        save_file({"w": torch.zeros(3)}, file, {"format": "pt" if content == "foreign" else '"gdd-generator/1"'})
    with pytest.raises(UserError) as e:
        gdd_dist.load_generator(file, "cpu")
    assert str(file) in str(e.value)
    assert "remove" not in str(e.value)
    assert "; give " in str(e.value)


def test_class_names_that_are_no_text_can_be_printed(bare: Path, tmp_path: Path) -> None:
    weights, meta = read_network(bare)
    save_network(tmp_path / "g.safetensors", weights, {**meta, "classes": ["caf\udce9", *map(str, range(9))]})
    assert gdd_dist.load_generator(tmp_path / "g.safetensors", "cpu").classes[0] == "caf\\udce9"


@pytest.mark.parametrize("text", ["{}", "[]", '{"files": {"generator.safetensors": 3}}', '{"a'])
def test_contents_of_another_shape_are_one_line(digits: Path, tmp_path: Path, text: str) -> None:
    made = make(tmp_path / "out", digits)
    directory = made.dirs["matching"]
    generator = gdd_dist.load_generator(made.out, "cpu")
    (directory / "contents.json").write_text(text)
    said = f"{directory}/contents.json is damaged .*; remove {directory} and run gdd_dist.train again"
    with pytest.raises(UserError, match=said):
        gdd_dist.load_generator(made.out, "cpu")
    with pytest.raises(UserError, match=said):
        generator.dataset(1, soft_labels=True)


@pytest.mark.parametrize(
    "changed",
    [
        {"family": ["x"]},
        {"classes": 5},
        {"provenance": []},
        {"provenance": {"fingerprints": 3}},
        {"arch": []},
        {"arch": {}},
        {"arch": {"classes": "many"}},
    ],
)
def test_metadata_of_another_shape_are_one_line(bare: Path, tmp_path: Path, changed: dict[str, object]) -> None:
    weights, meta = read_network(bare)
    path = tmp_path / "g.safetensors"
    save_network(path, weights, {**meta, **changed})
    with pytest.raises(UserError, match=f"{path} does not hold the generator that it names .*; give a run directory"):
        gdd_dist.load_generator(path, "cpu")


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "[]",
        "report: 3",
        "report: [1]",
        "report: {label_temperature: hot}",
        "report: {label_temperature: 0}",
        "report: {label_temperature: .nan}",
        "report: {\xff",
        "a: \x00",
    ],
)
def test_a_run_without_a_readable_label_temperature_is_one_line(
    generator: Sampler, tmp_path: Path, text: str | None
) -> None:
    config = tmp_path / "config.yaml"
    if text is not None:
        config.write_bytes(text.encode("latin-1"))
    moved = copy.copy(generator)
    moved._out = tmp_path
    said = rf"cannot read report.label_temperature in {config} \(.*; run the same gdd_dist.train again"
    for call in (lambda: moved.dataset(1, soft_labels=True), lambda: moved.stream(4, soft_labels=True)):
        with pytest.raises(UserError, match=said) as fault:
            call()
        assert "\n" not in str(fault.value)


@pytest.mark.parametrize("temperature", [0, -1, float("nan"), float("inf")])
def test_a_temperature_that_is_not_positive_is_refused(generator: Sampler, temperature: float) -> None:
    images = generator.sample([0, 1])
    with pytest.raises(UserError, match=f"temperature {temperature} is not positive; give more than 0"):
        generator.soft_labels(images, temperature)
    assert generator.soft_labels(images, 2.0).isfinite().all()


@pytest.mark.parametrize("device", [None, "hpu", "xpu", 3.5, "vulkan"])
def test_whatever_is_no_device_here_is_refused(bare: Path, device: object) -> None:
    with pytest.raises(UserError, match=f"device {device} is not available .*; give auto, cpu or cuda"):
        gdd_dist.load_generator(bare, device)  # type: ignore[arg-type]


def test_a_path_that_cannot_be_a_generator_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="~nobody-of-this-name/run does not exist; give a run directory"):
        gdd_dist.load_generator("~nobody-of-this-name/run", "cpu")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=f"{tmp_path}/pipe is not a file; give a run directory"):
        gdd_dist.load_generator(tmp_path / "pipe", "cpu")


def test_a_stream_that_has_begun_gives_no_batch_twice_in_forked_workers(
    generator: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = [generator.stream(4, seed=1) for _ in range(2)]
    begun = [next(stream)[0] for stream in streams]
    assert torch.equal(*begun)
    after = []
    for worker, stream in enumerate(streams):  # what torch does in each worker's copy
        info = SimpleNamespace(id=worker, num_workers=2)
        monkeypatch.setattr(sampler, "get_worker_info", lambda info=info: info)
        after += [next(stream)[0] for _ in range(3)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations([begun[0], *after], 2))
