"""python -m gdd_dist.export: the distilled set as a product, opened by the libraries that its users have."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from made_runs import Made, make
from PIL import Image

import gdd_dist
from gdd_dist import export
from gdd_dist.config.command_line import settings_of
from gdd_dist.data.images import Images
from gdd_dist.evaluation.students import Frozen
from gdd_dist.pipeline.finished_run import opened
from gdd_dist.product.whole_directory import whole_directory
from gdd_dist.training.condense import condensed
from sharding.errors import UserError
from sharding.manifest import Manifest
from sharding.verify import verify

EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "train_resnet.py"


@pytest.fixture(scope="module")
def made(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("export") / "out", digits)


@pytest.fixture(scope="module")
def sets(made: Made, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One set in each format, IPC 3, soft labels; the tars hold 12 images each."""
    root = tmp_path_factory.mktemp("sets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "SHARD_IMAGES", 12)
        patch.setattr(export, "CHUNK", 7)
        for kind in export.WRITERS:
            export.main(
                [str(made.out), str(root / kind), "--ipc", "3", "--format", kind, "--labels", "soft", "--device", "cpu"]
            )
    return {kind: root / kind for kind in export.WRITERS}


@pytest.fixture(scope="module")
def expected(made: Made) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images [N, H, W], labels, soft labels of the set, as Python draws them."""
    generator = gdd_dist.load_generator(made.out, "cpu")
    images, labels = generator.balanced(30)
    part, some = generator.balanced(7, first=20)
    assert torch.equal(part, images[20:27])
    assert some.tolist() == labels[20:27].tolist()
    return images[:, 0].numpy(), labels, generator.soft_labels(images).numpy()


def same(found: list[tuple[Any, int, Any]], expected: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    images, labels, soft = (np.stack([np.asarray(row[i]) for row in found]) for i in range(3))
    assert np.array_equal(images, expected[0])
    assert labels.tolist() == expected[1].tolist()
    np.testing.assert_allclose(soft, expected[2], atol=1e-5)


def test_stock_webdataset_reads_the_shards(sets: dict[str, Path], expected: Any) -> None:
    import webdataset

    shards = sorted(map(str, sets["webdataset"].glob("train/*.tar")))
    assert len(shards) == 3
    rows = webdataset.WebDataset(shards, shardshuffle=False).decode("pill").to_tuple("png", "cls", "soft.npy")
    same(list(rows), expected)


def test_hugging_face_datasets_reads_the_directory_offline(
    sets: dict[str, Path], expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = datasets.load_dataset(str(sets["webdataset"]), split="train", cache_dir=str(tmp_path))
    same([(r["png"], int(r["cls"]), r["soft.npy"]) for r in rows], expected)
    folder = datasets.load_dataset(str(sets["folder"]), split="train", cache_dir=str(tmp_path))
    assert folder.features["label"].names == [f"{i:04d}_{i}" for i in range(10)]
    assert sorted(folder["label"]) == sorted(expected[1].tolist())


def test_our_own_loader_reads_the_directory_and_every_byte_is_right(sets: dict[str, Path], expected: Any) -> None:
    directory = sets["webdataset"]
    verify(directory, deep=True, log=print)
    manifest = Manifest.load(directory)
    assert list(manifest.splits) == ["train"]
    assert manifest.splits["train"].class_counts == (3,) * 10
    images = Images(directory, manifest, "train")
    assert np.array_equal(images.read(np.arange(30))[:, 0].numpy(), expected[0])
    assert images.labels.tolist() == expected[1].tolist()
    pixels = expected[0] / 255
    assert manifest.mean[0] == pytest.approx(pixels.mean())
    assert manifest.std[0] == pytest.approx(pixels.std())


def test_torchvision_reads_the_folders_in_class_order(sets: dict[str, Path], expected: Any) -> None:
    from torchvision.datasets import ImageFolder

    found = ImageFolder(str(sets["folder"]))
    assert found.classes == [f"{i:04d}_{i}" for i in range(10)]
    assert len(found) == 30
    for path, label in found.samples:
        number = int(Path(path).stem)
        assert expected[1][number] == label
        assert np.array_equal(np.asarray(Image.open(path)), expected[0][number])
        soft = np.load(Path(path).with_suffix(".soft.npy"), allow_pickle=False)
        np.testing.assert_allclose(soft, expected[2][number], atol=1e-5)


def test_numpy_reads_the_npz_without_pickle(sets: dict[str, Path], expected: Any) -> None:
    data = np.load(sets["npz"] / "train.npz", allow_pickle=False)
    assert data["images"].shape == (30, 1, 16, 16)
    assert data["classes"].tolist() == [str(i) for i in range(10)]
    same(list(zip(data["images"][:, 0], data["labels"], data["soft"], strict=True)), expected)


def test_the_card_names_data_method_figures_licence_and_shows_samples(sets: dict[str, Path], made: Made) -> None:
    for kind, directory in sets.items():
        text = (directory / "README.md").read_text()
        head = yaml.safe_load(text.split("---")[1])
        assert head["license"] == "unknown"
        assert head["size_categories"] == ["n<1K"]
        for part in ("# digits, distilled: 30 images, 3 of each of 10 classes", "## Figures", "Not measured", "seed 0"):
            assert part in text
        assert made.fingerprints["matching"] in text
        assert str(made.out) not in text
        with Image.open(directory / "samples.png") as picture:
            assert np.asarray(picture).std() > 5
        assert ("configs" in head) == (kind != "npz")


def test_figures_come_from_the_runs_report(reported: Any, tmp_path: Path) -> None:
    dest = tmp_path / "set"
    argv = [str(reported.out), str(dest), "--total", "25", "--licence", "cc-by-4.0", "--device", "cpu", "--seed", "5"]
    export.main(argv)
    text = (dest / "README.md").read_text()
    assert "| matched | convnet:8 | regenerate | hard | 1 |" in text
    assert "license: cc-by-4.0" in text
    assert Manifest.load(dest).splits["train"].class_counts == (3,) * 5 + (2,) * 5


def test_the_same_command_gives_the_same_bytes_and_another_seed_others(made: Made, tmp_path: Path) -> None:
    tars = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        export.main([str(made.out), str(tmp_path / name), "--ipc", "1", "--seed", seed, "--device", "cpu"])
        tars.append((tmp_path / name / "train" / "000000.tar").read_bytes())
    assert tars[0] == tars[1] != tars[2]


def test_a_single_file_gives_hard_labels_and_refuses_soft_ones(made: Made, tmp_path: Path) -> None:
    file = str(made.dirs["matching"] / "generator.safetensors")
    export.main([file, str(tmp_path / "hard"), "--ipc", "1", "--device", "cpu"])
    with pytest.raises(UserError, match="soft labels and select > 1 need the run's teachers"):
        export.main([file, str(tmp_path / "soft"), "--ipc", "1", "--labels", "soft", "--device", "cpu"])
    assert [p.name for p in tmp_path.iterdir()] == ["hard"], "a failed export leaves something behind"


def test_a_condensed_set_is_the_one_that_the_teachers_moved(reported: Any, tmp_path: Path) -> None:
    argv = [
        str(reported.out),
        str(tmp_path / "set"),
        "--ipc",
        "2",
        "--condense",
        "3",
        "--format",
        "npz",
        "--device",
        "cpu",
    ]
    export.main([*argv, "--labels", "soft"])
    config = settings_of(reported.out, "--device", "cpu")
    ctx, _, directories = opened(reported.out, config, ("teachers", "matching"), lambda world: None)
    frozen, done = Frozen(ctx, directories), list[int]()
    images = condensed(ctx, frozen.generator("matched"), frozen.teachers, 2, 0, "export", 3, done.append)
    found = np.load(tmp_path / "set" / "train.npz")
    order = np.argsort(found["labels"], kind="stable")
    assert np.array_equal(found["images"][order], images.numpy())
    assert found["labels"][order].tolist() == np.repeat(np.arange(ctx.classes), 2).tolist()
    assert done == [1, 2, 3]
    assert "moved them for 3 steps" in (tmp_path / "set" / "README.md").read_text()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--ipc", "0"], "the set would have no images"),
        ([], "one of the arguments --ipc --total is required"),
        (["--ipc", "1", "--total", "5"], "not allowed with argument"),
        (["--ipc", "1", "--format", "zip"], "invalid choice: 'zip'"),
        (["--total", "9", "--condense", "5"], "--condense needs a number of steps above 0 and --ipc"),
        (["--ipc", "1", "--condense", "5", "--truncation", "1"], "takes no --truncation"),
        (["--ipc", "1", "--condense", "-5"], "a number of steps above 0"),
        (["--ipc", "10000000", "--condense", "5"], "give --ipc of at most 1000"),
    ],
)
def test_wrong_use_is_one_line(made: Made, tmp_path: Path, argv: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        export.main([str(made.out), str(tmp_path / "d"), *argv])


def test_a_directory_that_holds_something_is_left_alone(made: Made, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty; choose a new DEST"):
        export.main([str(made.out), str(tmp_path), "--ipc", "1"])
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_class_names_become_file_names_whatever_they_hold() -> None:
    assert export.safe("sea/lion..é") == "sea_lion..é"
    assert "/" not in export.safe("../../etc")


def test_the_example_trains_a_torchvision_resnet_on_the_set_and_measures_it(
    sets: dict[str, Path], digits: Path
) -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 36
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(sets["webdataset"]), str(digits), "1"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("accuracy on real test images: ")
    assert 0 <= float(done.stdout.split(":")[1].rstrip(" %\n")) <= 100


def test_torch_sees_no_difference_between_the_formats(sets: dict[str, Path]) -> None:
    data = np.load(sets["npz"] / "train.npz", allow_pickle=False)
    manifest = Manifest.load(sets["webdataset"])
    assert torch.equal(
        torch.from_numpy(data["images"]), Images(sets["webdataset"], manifest, "train").read(np.arange(30))
    )


def test_a_directory_that_is_there_is_filled_also_through_a_link_or_from_within(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--ipc", "1", "--device", "cpu"]
    (tmp_path / "here").mkdir()
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    monkeypatch.chdir(tmp_path / "here")
    before = os.stat(".").st_ino
    export.main([str(made.out), ".", *argv])
    assert os.stat(tmp_path / "here").st_ino == before
    export.main([str(made.out), str(tmp_path / "link"), *argv])
    monkeypatch.setenv("HOME", str(tmp_path))
    export.main([str(made.out), "~/new", *argv])
    names = {"README.md", "manifest.json", "samples.png", "train"}
    for name in ("here", "target", "new"):
        assert {p.name for p in (tmp_path / name).iterdir()} == names
        verify(tmp_path / name, deep=True, log=print)
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(UserError, match="is a link whose target does not exist"):
        export.main([str(made.out), str(tmp_path / "dangling"), *argv])


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "tpu:0", "cpu:-3"])
def test_a_device_that_is_not_here_is_refused(made: Made, tmp_path: Path, device: str) -> None:
    with pytest.raises(UserError, match=f"device {device} .*; give auto, cpu or cuda"):
        export.main([str(made.out), str(tmp_path / "x"), "--ipc", "1", "--device", device])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("webdataset", "free on the disk of DEST; ask for fewer"),
        ("npz", "GB .*; ask for fewer"),
        ("folder", "free on the disk of DEST"),
    ],
)
def test_more_than_fits_is_refused_before_the_first_image_is_written(
    made: Made, tmp_path: Path, kind: str, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        export.main([str(made.out), str(tmp_path / "x"), "--total", str(10**12), "--format", kind, "--device", "cpu"])
    assert not any(tmp_path.iterdir())


def test_a_damaged_report_costs_the_set_only_the_figures_in_its_card(
    reported: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(reported.out, tmp_path / "out", symlinks=True))
    for number, text in enumerate(("{}", '{"results": [{}]}', '{"a')):
        (out / "report" / "latest" / "metrics.json").write_text(text)
        dest = tmp_path / f"set-{number}"
        export.main([str(out), str(dest), "--ipc", "1", "--device", "cpu"])
        assert "Not shown: the report beside the generator is damaged." in (dest / "README.md").read_text()
        assert "metrics.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_after_a_signal_the_same_command_starts_anew(
    made: Made, tmp_path: Path, there: bool, number: signal.Signals
) -> None:
    dest = tmp_path / "sets" / ("x" * 250)  # the longest names are possible too
    (dest if there else dest.parent).mkdir(parents=True)
    argv = [str(made.out), str(dest), "--device", "cpu", "--format", "folder"]
    command = [sys.executable, "-m", "gdd_dist.export", *argv, "--ipc", "100000"]
    hears = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # under nohup it would ignore SIGHUP, as it should
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=hears) as process:
        deadline = time.monotonic() + 600
        while not any(dest.parent.rglob("*.png")) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(number)
        err = process.communicate()[1]
    left = [p for p in dest.parent.rglob("*") if p != dest]
    if number == signal.SIGKILL:
        assert left
    else:
        assert process.returncode == 128 + number
        assert err == f"stopped: by {number.name}; {dest} was not written; run the same command again\n"
        assert not left
    export.main([*argv, "--ipc", "1"])
    assert [p for p in dest.parent.iterdir()] == [dest]
    assert len(list(dest.rglob("*.png"))) == 10 + 1


def test_one_export_at_a_time_writes_a_directory(made: Made, tmp_path: Path) -> None:
    dest = tmp_path / "set"
    with whole_directory(dest, "README.md") as work:
        (work / "README.md").touch()
        with pytest.raises(UserError, match=f"{dest} is being written by process {os.getpid()} on .*; wait for it"):
            export.main([str(made.out), str(dest), "--ipc", "1", "--device", "cpu"])
    assert [p.name for p in tmp_path.rglob("*")] == ["set", "README.md"]


def test_a_finished_step_is_not_written_into(made: Made) -> None:
    for dest in (made.dirs["matching"] / "set", made.out / "matching" / "latest" / "a" / "b"):
        with pytest.raises(UserError, match=f"{dest} would lie in a finished step of a run"):
            export.main([str(made.out), str(dest), "--ipc", "1", "--device", "cpu"])
        assert not dest.parent.exists() or "set" not in {p.name for p in dest.parent.iterdir()}


def test_what_soft_labels_lack_is_learnt_before_anything_is_written(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = make(tmp_path / "out", digits)
    argv = [str(out.out), str(tmp_path / "set"), "--ipc", "1", "--labels", "soft", "--device", "cpu"]
    monkeypatch.setattr(export, "draw", lambda *_: pytest.fail("the set was begun"))
    (out.out / "config.yaml").write_text("")
    with pytest.raises(UserError, match=f"cannot read report.label_temperature in {out.out}/config.yaml"):
        export.main(argv)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_condensing_a_file_asks_for_the_run(made: Made, tmp_path: Path) -> None:
    argv = [str(made.dirs["matching"] / "generator.safetensors"), str(tmp_path / "x"), "--ipc", "1"]
    with pytest.raises(UserError, match="--condense needs the run's teachers and data; give the run directory"):
        export.main([*argv, "--condense", "3"])
