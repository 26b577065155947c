"""--teachers.pretrained DIR: classifiers that somebody else trained are the pool."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import ranks
import torch
from conftest import Finished
from safetensors.torch import load_file, save_file

from gdd_dist.config import command_line
from gdd_dist.config.steps import TABLE
from gdd_dist.models import pretrained, pretrained_networks
from gdd_dist.models.classifiers import build_classifier
from gdd_dist.models.files import Teacher, read_teachers
from gdd_dist.storage.json_files import read_json
from sharding.errors import UserError
from sharding.manifest import Manifest


def manifest(channels: int = 3, classes: int = 4, size: int = 16) -> Manifest:
    names = tuple(f"c{i}" for i in range(classes))
    return Manifest("shapes", names, size, size, channels, (0.5,) * channels, (0.25,) * channels, {}, {})


def save(path: Path, net: torch.nn.Module, **meta: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), str(path), metadata=meta or None)
    return path


def ours(classes: int = 10, channels: int = 1) -> torch.nn.Module:
    mean, std = [0.0] * channels, [1.0] * channels
    return build_classifier("convnet:8", channels=channels, size=16, classes=classes, mean=mean, std=std)


def only(directory: Path) -> pretrained.Pretrained:
    (found,) = pretrained.files(str(directory))
    return found


def test_a_run_takes_them_as_they_are_and_shows_their_accuracy(
    reported: Finished, digits: Path, tmp_path: Path
) -> None:
    """The pool of another run, without its lists: the same logits, and no training."""
    given = tmp_path / "given"
    given.mkdir()
    theirs = sorted((reported.out / "teachers" / "latest").glob("*.safetensors"))
    listed = {r["file"]: r["val_accuracy"] for r in read_json(theirs[0].parent / "teachers.json")["teachers"]}
    for path in theirs:
        shutil.copy(path, given)
    out = tmp_path / "out"
    argv = [*reported.argv, "--teachers.pretrained", str(given), "--until", "logits"]
    ended = ranks.start(out, argv, 2).wait()
    assert ended.codes == [0, 0], ended.text
    pool = read_teachers(out / "teachers" / "latest")
    assert [t.architecture for t in pool] == ["convnet:8"] * len(theirs)
    assert all(t.last for t in pool)
    assert [t.val_accuracy for t in pool] == pytest.approx([listed[p.name] for p in theirs])
    for mine, path in zip(pool, theirs, strict=True):
        assert mine.weights().keys() == load_file(path).keys()
        assert all(torch.equal(value, load_file(path)[name]) for name, value in mine.weights().items())
    assert sum("% on val" in line for text in ended.err for line in text.splitlines()) == len(theirs)
    val = Manifest.load(digits).splits["val"].samples
    assert ranks.steps(out)["teachers"]["images_processed"] == len(theirs) * val
    again = ranks.train(out, argv)
    assert {r["status"] for r in again.values()} == {"reused"}


def test_a_network_of_torchvisions_answers_as_it_did(tmp_path: Path) -> None:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    net = resnet18(num_classes=4).eval()
    save(
        tmp_path / "a.safetensors",
        net,
        architecture="torchvision:resnet18",
        mean="[0.1, 0.2, 0.3]",
        std="[0.5, 0.6, 0.7]",
    )
    loaded = pretrained_networks.load(only(tmp_path), manifest()).eval()
    pixels = torch.rand(2, 3, 16, 16)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7]))
    with torch.no_grad():
        torch.testing.assert_close(loaded(2 * pixels - 1), net((pixels - mean) / std), rtol=1e-3, atol=1e-4)
    # Later steps load it from the pool's own file.
    save(tmp_path / "pool" / "t.safetensors", loaded, architecture=json.dumps("torchvision:resnet18"))
    again = Teacher(0, tmp_path / "pool" / "t.safetensors", "torchvision:resnet18", True, 0.0).load(3, 16, 4)
    with torch.no_grad():
        assert torch.equal(again(pixels), loaded(pixels))


def test_without_mean_and_std_it_gets_the_data_sets(tmp_path: Path) -> None:
    body = ours(4, 3).body
    save(tmp_path / "a.safetensors", body, architecture="convnet:8")
    loaded = pretrained_networks.load(only(tmp_path), manifest())
    assert loaded.mean.flatten().tolist() == [0.0] * 3
    assert loaded.std.flatten().tolist() == [0.5] * 3


@pytest.mark.parametrize(
    ("meta", "classes", "channels", "said"),
    [
        ({}, 10, 1, "does not name its architecture"),
        ({"architecture": "convnit"}, 10, 1, "unknown classifier 'convnit'"),
        ({"architecture": "torchvision:resnet18"}, 10, 1, "needs images of 3 channels, but these have 1"),
        ({"architecture": "torchvision:resnet1"}, 10, 3, "torchvision has no classifier 'resnet1'"),
        ({"architecture": "convnet:8"}, 7, 1, "has 7 classes, but shapes has 10"),
        ({"architecture": "convnet:16"}, 10, 1, r"body.0.weight is \(8, 1, 3, 3\) instead of \(16, 1, 3, 3\)"),
        ({"architecture": "vgg11:8"}, 10, 1, "it is not a vgg11:8|instead of"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, meta: dict[str, str], classes: int, channels: int, said: str
) -> None:
    save(tmp_path / "a.safetensors", ours(classes, channels), **meta)
    with pytest.raises(UserError, match=said) as e:
        pretrained_networks.load(only(tmp_path), manifest(channels, 10))
    assert "a.safetensors" in str(e.value)


def test_an_empty_directory_and_a_torn_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no .safetensors file; save it with metadata"):
        command_line.parse(["--teachers.pretrained", str(tmp_path), "--preset", "digits"])
    path = save(tmp_path / "a.safetensors", ours(), architecture="convnet:8")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"cannot read .*a.safetensors"):
        pretrained.files(str(tmp_path))


def test_the_fingerprint_is_that_of_their_content_wherever_they_lie(tmp_path: Path) -> None:
    save(tmp_path / "a" / "x.safetensors", ours(), architecture="convnet:8")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    save(tmp_path / "c" / "x.safetensors", ours(), architecture="convnet:8")  # other weights

    def shaped(name: str, *more: str) -> dict:
        argv = ["--preset", "digits", "--teachers.pretrained", str(tmp_path / name), *more]
        return TABLE["teachers"].settings(command_line.parse(argv).config)

    assert shaped("a") == shaped("b") == shaped("a", "--teachers.epochs", "99")
    assert shaped("a") != shaped("c")
    parsed = command_line.parse(["--preset", "digits", "--teachers.pretrained", str(tmp_path / "a")]).config
    assert (parsed.teachers.architectures, parsed.teachers.seeds, parsed.teachers.snapshots) == (("convnet:8",), 1, 1)
