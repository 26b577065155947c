import dataclasses
import json
import shutil

import numpy as np
import pytest
from tars import samples, tar
from test_sharding_support import contents, environment, flip, run, write_folder

import sharding
from sharding.__main__ import main
from sharding.errors import UserError
from sharding.files import sha256_file
from sharding.manifest import Manifest
from sharding.options import Options
from sharding.verify import verify
from sharding.writer import build


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("built")
    folder = write_folder(root / "data", {"a": 40, "b": 20})
    build(f"folder:{folder}", root / "dest", Options(workers=1, test_fraction=0.2, shard_size=20_000))
    return root / "dest"


@pytest.fixture
def dest(built, tmp_path):
    shutil.copytree(built, tmp_path / "dest")
    return tmp_path / "dest"


def failure(capsys, *arguments: object) -> str:
    """The one error line of a command that must fail."""
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "Traceback" not in err
    assert not out
    return lines[0]


def test_build_info_and_verify_in_real_processes(tmp_path):
    folder = write_folder(tmp_path / "data", {"a": 20, "b": 20})
    first = run("build", f"folder:{folder}", tmp_path / "d", "--test-fraction", "0.2", "--workers", "2")
    said = f"data is built in {tmp_path / 'd'}: train 30, val 2, test 8\n2 classes: a 20, b 20\n"
    assert (first.returncode, first.stdout) == (0, said)
    assert "writing: 40 images" in first.stderr
    again = run("build", f"folder:{folder}", tmp_path / "d", "--test-fraction", "0.2")
    assert (again.returncode, again.stdout[:21]) == (0, "data is already there")
    info = run("info", tmp_path / "d", "--json")
    assert json.loads(info.stdout) == json.loads((tmp_path / "d/manifest.json").read_text())
    told = run("info", tmp_path / "d").stdout
    assert "data: 2 classes, 8×8, 3 channels" in told
    assert told.splitlines()[-2:] == [
        "     0        15         1         4  a",
        "     1        15         1         4  b",
    ]
    deep = run("verify", tmp_path / "d", "--deep")
    assert deep.returncode == 0
    assert "every image are right" in deep.stdout


def test_user_errors_are_one_line_and_status_2(tmp_path):
    done = run("build", "folder:nowhere", tmp_path / "d")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: nowhere does not exist; check the path\n")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required"),
        (["build"], "the following arguments are required: SOURCE, DEST"),
        (["biuld", "digits", "d"], "invalid choice: 'biuld'"),
        (["build", "digits", "d", "--colour"], "unrecognized arguments: --colour"),
        (["build", "digits", "d", "--workers", "two"], "invalid int value: 'two'"),
        (["build", "svhn", "d"], "unknown source 'svhn'; give one of digits"),
        (["build", "mnist", "d"], "source 'mnist' lacks its path; write mnist:PATH"),
        (["build", "digits", "d", "--shard-size", "big"], "size 'big' is not a number of bytes"),
        (["build", "digits", "d", "--val-fraction", "-0.1"], "--val-fraction is -0.1"),
        (["build", "digits", "d", "--val-fraction", "2"], "--val-fraction is 2.0"),
        (["build", "digits", "d", "--test-fraction", "0.1"], "digits already has a test set"),
        (["build", "digits", "d", "--on-error", "x"], "--on-error is x; give stop or skip"),
        (["build", "folder:d", "d"], "d does not exist"),
        (["info", "d"], "no dataset in d"),
        (["verify", "d", "--deep"], "no dataset in d"),
    ],
)
def test_wrong_use_is_one_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in failure(capsys, *arguments)
    assert not list(tmp_path.iterdir())


def test_a_destination_that_cannot_be_written_is_one_line(capsys):
    assert "cannot read or write /proc/" in failure(capsys, "build", "digits", "/proc/nowhere/d")


def test_a_destination_that_cannot_be_a_directory_is_told_from_a_full_disk(capsys, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "lost").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    for dest, why in (
        ("file", "file is not a directory; choose another DEST"),
        ("file/d/e", "file is not a directory; choose another DEST"),
        ("lost", "lost is a link that leads nowhere; choose another DEST"),
        ("lost/d", "lost is a link that leads nowhere; choose another DEST"),
        ("circle/d", "choose another DEST"),
        ("x" * 300, "cannot be a directory (File name too long); choose another DEST"),
        (f"{'y' * 300}/d", "cannot be a directory (File name too long); choose another DEST"),
    ):
        assert why in failure(capsys, "build", "digits", tmp_path / dest)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "lost", "circle"}


def test_a_destination_inside_any_directory_of_tars_is_refused(tmp_path):
    for i in range(2):
        tar(tmp_path / f"{i}/x/{i}.tar", samples(100 * i, 12))
    one, two = (tmp_path / name for name in "01")
    for source in (f"{one}", f"{two}::{one}", f"train={two}/x,test={one}", f"train={two}/x/1.tar,test={one}/**/*.tar"):
        with pytest.raises(UserError, match=rf"lies inside the source {one}/?; choose another DEST"):
            build(f"webdataset:{source}", one / "d")
    assert not (one / "d").exists()
    assert build(f"webdataset:train={one}/x/*.tar,test={two}/x", one / "d", Options(workers=1)).manifest


def test_a_sound_data_set_passes(dest):
    assert verify(dest, deep=True, log=print) == Manifest.load(dest)


@pytest.mark.parametrize("deep", [[], ["--deep"]])
@pytest.mark.parametrize("file", ["train/000001.tar", "train/000001.npy", "test/000000.tar", "val/000000.npy"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "grow", "remove"])
def test_verify_names_a_damaged_file_and_changes_nothing(capsys, dest, deep, file, damage):
    path = dest / file
    if damage == "flip":
        flip(path, path.stat().st_size // 2)
    elif damage == "truncate":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "grow":
        path.write_bytes(path.read_bytes() + bytes(512))
    else:
        path.unlink()
    before = contents(dest, without=())
    assert file in failure(capsys, "verify", dest, *deep)
    assert contents(dest, without=()) == before


def test_verify_finds_the_manifest_of_another_data_set(capsys, dest, tmp_path):
    folder = write_folder(tmp_path / "data", {"a": 40, "b": 20}, seed=1)
    build(f"folder:{folder}", tmp_path / "other", Options(workers=1, test_fraction=0.2, shard_size=20_000))
    shutil.copy(tmp_path / "other/manifest.json", dest)
    assert "train/000000.tar" in failure(capsys, "verify", dest)


def test_verify_counts_faults_and_finds_strays(capsys, dest):
    for file in ("train/000000.tar", "test/000000.tar"):
        flip(dest / file, 700)
    assert "train/000000.tar was altered" in (line := failure(capsys, "verify", dest))
    assert "(1 more faults)" in line
    for file in ("train/000000.tar", "test/000000.tar"):
        flip(dest / file, 700)
    shutil.copy(dest / "train/000000.tar", dest / "train/000099.tar")
    assert "train/000099.tar is not in the manifest; remove it" in failure(capsys, "verify", dest)


def forge(dest, change_index=None, **changes: object) -> None:
    """Change data and manifest so that all sums agree: only a look inside can tell."""
    manifest = Manifest.load(dest)
    if change_index:
        train = manifest.splits["train"]
        path = dest / train.shards[0].index_file
        index = np.load(path)
        change_index(index)
        np.save(path, index)
        shard = dataclasses.replace(train.shards[0], index_sha256=sha256_file(path))
        train = dataclasses.replace(train, shards=(shard, *train.shards[1:]))
        changes["splits"] = manifest.splits | {"train": train}
    dataclasses.replace(manifest, **changes).save(dest)


def swap_two_labels(index: np.ndarray) -> None:
    other = np.flatnonzero(index[:, 2] != index[0, 2])[0]
    index[[0, other], 2] = index[[other, 0], 2]


def shift_a_payload(index: np.ndarray) -> None:
    index[0, 0] += 1


@pytest.mark.parametrize("change", [swap_two_labels, shift_a_payload])
def test_deep_finds_an_index_that_does_not_describe_its_tar(capsys, dest, change):
    forge(dest, change)
    assert main(["verify", str(dest)]) == 0
    capsys.readouterr()
    assert "train/000000.npy does not match" in failure(capsys, "verify", dest, "--deep")


def test_deep_finds_wrong_statistics_and_a_wrong_size(capsys, dest):
    manifest = Manifest.load(dest)
    forge(dest, mean=(0.4, *manifest.mean[1:]))
    assert "mean or std of train" in failure(capsys, "verify", dest, "--deep")
    forge(dest, mean=manifest.mean, height=9)
    assert "train/000000.tar, row 0: an image of 8x8 RGB" in failure(capsys, "verify", dest, "--deep")


def test_digits_are_built_quietly_from_python(tmp_path, capsys):
    lines: list[str] = []
    manifest = sharding.build_digits(tmp_path / "d", log=lines.append)
    assert manifest == Manifest.load(tmp_path / "d") == sharding.build_digits(tmp_path / "d")
    assert any("1,797 images" in line for line in lines)
    assert capsys.readouterr() == ("", "")
    with pytest.raises(UserError, match="already holds"):
        sharding.build_digits(tmp_path)


PROGRAMS = ("-m sharding", "-c 'import gdd_dist.entry_points as e; e.shards()'")
"""By its module, and as the program gdd-shards that a wheel installs."""


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("info {dest} >&-", 0),
        ("info {dest} 2>&-", 0),
        ("info {dest} | true", 0),
        ("info {dest} | sleep 0; exit ${{PIPESTATUS[0]}}", None),
        ("info {dest} > /dev/full", 2),
        ("build folder:{folder} {dest}-more --test-fraction 0.2 >&- 2>&-", 0),
    ],
)
def test_outputs_that_are_closed_broken_or_full_are_no_traceback(dest, tmp_path, command, status, program):
    import subprocess
    import sys

    folder = write_folder(tmp_path / "data", {"a": 20, "b": 20})
    line = f"{sys.executable} {program} {command.format(dest=dest, folder=folder)}"
    buffered = {k: v for k, v in environment().items() if k != "PYTHONUNBUFFERED"}  # as most people have it
    done = subprocess.run(["bash", "-c", line], env=buffered, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.returncode in ((0, 1) if status is None else (status,))
    assert (tmp_path / "dest-more/manifest.json").exists() == command.startswith("build")


def test_options_reach_the_build(tmp_path, capsys):
    folder = write_folder(tmp_path / "s", {"train": 6, "b": 6, "c": 6}, channels=1)
    words = ["--layout", "classes", "--classes", "train", "c", "--value-range", "-10", "400", "--test-fraction", "0.2"]
    assert main(["build", f"folder:{folder}", str(tmp_path / "d"), *words, "--workers", "1", "--seed", "3"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1:] == ["2 classes: train 6, c 6", "left out: images of other classes 6"]
    assert "--value-range is 5 2" in failure(
        capsys, "build", f"folder:{folder}", tmp_path / "e", "--value-range", "5", "2"
    )
    assert "--first-label is -1" in failure(capsys, "build", f"folder:{folder}", tmp_path / "e", "--first-label", "-1")
    assert "--layout is flat" in failure(capsys, "build", f"folder:{folder}", tmp_path / "e", "--layout", "flat")
    assert "--shard-size" in failure(
        capsys, "build", f"folder:{folder}", tmp_path / "e", "--shard-size", "0." + "0" * 400 + "1"
    )
    assert (
        main(
            [
                "build",
                f"folder:{folder}",
                str(tmp_path / "f"),
                "--shard-size",
                "9" * 400 + "GB",
                "--test-fraction",
                "0.2",
            ]
        )
        == 0
    )


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_ascii_cannot_say_is_replaced(dest, program):
    import subprocess
    import sys

    classes = dataclasses.replace(Manifest.load(dest), classes=("猫", "a\nb"))
    classes.save(dest)
    env = environment() | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = subprocess.run(["bash", "-c", f"{sys.executable} {program} info {dest}"], env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"\\u732b" in done.stdout
    assert b"a\\nb" in done.stdout


def test_an_unforeseen_error_is_one_line_and_debug_shows_where(dest, capsys, monkeypatch):
    monkeypatch.setattr(Manifest, "load", lambda _path: {}["s3://user:key@x"])
    assert main(["info", str(dest)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: KeyError: ")
    assert "run it again with --debug" in err
    assert "user:key" not in err
    assert err.count("\n") == 1
    with pytest.raises(KeyError):
        main(["info", str(dest), "--debug"])


def test_reading_shards_needs_neither_torch_nor_webdataset():
    import subprocess
    import sys

    code = (
        "import sys, sharding, sharding.shards, sharding.manifest; "
        "print(sorted({'torch', 'webdataset', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
