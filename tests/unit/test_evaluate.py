"""Rows: their budgets, fingerprints and random streams; every student trained once; python -m gdd_dist.evaluate."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from students import FINGERPRINTS, Made, make, settings

from gdd_dist import evaluate as program
from gdd_dist.context import Context
from gdd_dist.data.loader import to_float
from gdd_dist.grading import evaluate, record_path
from gdd_dist.rows import Row, budget, check, images_forwarded, jobs, plan, result, step_bounds, with_ceiling_shares
from gdd_dist.settings import Config, Matching
from gdd_dist.students import Frozen, Sets, real_samples, train
from sharding.errors import UserError
from sharding.manifest import Manifest, ShardInfo, SplitInfo


def manifest(*counts: int) -> Manifest:
    """Ten classes unless told; train holds ``counts``, test one image a class."""
    counts = counts or (30,) * 10
    sha = "0" * 64

    def split(*sizes: int) -> SplitInfo:
        shard = ShardInfo("train/000000.tar", sum(sizes), 1, sha, sha)
        return SplitInfo(sum(sizes), sizes, (shard,))

    names = tuple(f"class {i}" for i in range(len(counts)))
    splits = {"train": split(*counts), "val": split(*counts), "test": split(*(1,) * len(counts))}
    return Manifest("made", names, 16, 16, 1, (0.3,), (0.3,), {}, splits)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests share few cores."""
    monkeypatch.setattr("gdd_dist.distributed.World.threads", 1)


@pytest.fixture(scope="module")
def made(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("evaluate") / "out", digits)


class Quiet:
    """A monitor that shows nothing."""

    def already(self, done: int) -> None: ...

    def advance(self, done: int, note: str = "", images: int = 0) -> None: ...


def rows_of(ctx: Context, made: Made) -> list[dict[str, Any]]:
    return evaluate(ctx, made.dirs, made.fingerprints, Quiet())  # type: ignore[arg-type]


# rows


def test_plan_holds_every_combination_once_and_full_once_a_student() -> None:
    config = settings(ipc=(1, 2, 1), students=("convnet:8", "alexnet:8"))
    rows = plan(config)
    assert len(rows) == len(set(rows)) == 2 * (1 + 2 * 2 * 2 * 3)
    assert [r for r in rows if r.train_on == "full"] == [
        Row("full", "convnet:8", None, "hard", None),
        Row("full", "alexnet:8", None, "hard", None),
    ]


def test_without_baselines_only_the_asked_rows_remain() -> None:
    rows = plan(settings(baselines=("gan",), protocol=("fixed",), labels=("soft",)))
    assert [r.train_on for r in rows] == ["gan", "matched"]


@pytest.mark.parametrize(
    ("row", "ipc", "batch", "expected"),
    [
        # epochs 4, 10 classes of 30: (steps, batch, seen, distinct)
        (Row("gan", "convnet", "regenerate", "hard", 1), 1, 256, (4, 10, 40, 40)),
        (Row("gan", "convnet", "fixed", "hard", 1), 1, 256, (4, 10, 40, 10)),
        (Row("real", "convnet", "regenerate", "hard", 10), 10, 64, (8, 64, 400, 300)),
        (Row("real", "convnet", "regenerate", "soft", 3), 3, 256, (4, 30, 120, 120)),
        (Row("real", "convnet", "fixed", "hard", 10), 10, 256, (4, 100, 400, 100)),
        (Row("full", "convnet", None, "hard", None), 1, 256, (1, 256, 256, 256)),
        (Row("full", "convnet", None, "hard", None), 1, 1000, (1, 300, 300, 300)),
    ],
)
def test_budgets(row: Row, ipc: int, batch: int, expected: tuple[int, ...]) -> None:
    b = budget(settings(ipc=(ipc,), epochs=4, batch=batch), manifest(), row)
    assert (b.optimizer_steps, b.batch, b.images_seen, b.distinct_images_seen) == expected


def test_the_last_partial_batch_of_an_epoch_is_kept() -> None:
    assert step_bounds(10, 4, 2).tolist() == [0, 4, 8, 10, 14, 18, 20]
    assert step_bounds(8, 4, 2).tolist() == [0, 4, 8, 12, 16]


def test_an_unbalanced_class_runs_out_before_the_others() -> None:
    row = Row("real", "convnet", "regenerate", "hard", 2)
    assert budget(settings(ipc=(2,), epochs=4), manifest(3, 30), row).distinct_images_seen == 3 + 8


# fingerprints


def row_prints(config: Config, **changed: str) -> dict[Row, str]:
    found = jobs(config, manifest(), "float32", FINGERPRINTS | changed)
    return {j.row: j.fingerprint for j in found if j.seed == 0}


def changed_rows(a: dict[Row, str], b: dict[Row, str]) -> set[Row]:
    assert set(a) == set(b)
    return {row for row in a if a[row] != b[row]}


def test_another_generator_changes_matched_rows_alone() -> None:
    base, other = row_prints(settings()), row_prints(settings(), matching="f" * 16)
    assert changed_rows(base, other) == {r for r in base if r.train_on == "matched"}


def test_a_matching_setting_by_itself_changes_no_row() -> None:
    config = dataclasses.replace(settings(), matching=Matching(temperature=4.0))
    assert row_prints(settings()) == row_prints(config)


def test_another_gan_changes_gan_rows_alone_and_other_teachers_soft_rows_alone() -> None:
    base = row_prints(settings())
    assert changed_rows(base, row_prints(settings(), gan="f" * 16)) == {r for r in base if r.train_on == "gan"}
    assert changed_rows(base, row_prints(settings(), teachers="f" * 16)) == {r for r in base if r.labels == "soft"}
    assert changed_rows(base, row_prints(settings(), logits="f" * 16)) == set()
    assert changed_rows(base, row_prints(settings(), data="f" * 16)) == set(base)


def test_settings_change_the_rows_that_they_shape() -> None:
    base = row_prints(settings())
    full = {r for r in base if r.train_on == "full"}
    soft = {r for r in base if r.labels == "soft"}
    assert changed_rows(base, row_prints(settings(label_temperature=3.0))) == soft
    assert changed_rows(base, row_prints(settings(full_lr=0.5))) == full
    assert changed_rows(base, row_prints(settings(epochs=3))) == set(base) - full
    assert changed_rows(base, row_prints(settings(momentum=0.5))) == set(base)
    # A batch larger than the set is the set: only the full row sees the difference.
    assert changed_rows(base, row_prints(settings(batch=128))) == full


def test_each_student_seed_has_its_own_fingerprint_and_more_seeds_keep_the_old_ones() -> None:
    few = {j.fingerprint for j in jobs(settings(seeds=2), manifest(), "float32", FINGERPRINTS)}
    many = {j.fingerprint for j in jobs(settings(seeds=3), manifest(), "float32", FINGERPRINTS)}
    assert len(few) == 2 * 13
    assert few < many
    assert not few & {j.fingerprint for j in jobs(settings(seeds=2), manifest(), "bf16", FINGERPRINTS)}


# results


def measured(train_on: str, mean: float, labels: str = "hard", protocol: str = "regenerate") -> dict[str, Any]:
    row = Row(train_on, "convnet", protocol, labels, 1)
    return result(row, budget(settings(), manifest(), row), [0, 1], [mean - 1, mean + 1], 10)


def test_ceiling_share_is_the_way_from_chance_to_the_hard_regenerated_real_row() -> None:
    rows = [measured("real", 90.0), measured("matched", 70.0), measured("real", 95.0, "soft"), measured("gan", 10.0)]
    shares = [r["ceiling_share"] for r in with_ceiling_shares(rows, 10)]
    assert shares == pytest.approx([1.0, 0.75, 85 / 80, 0.0])


def test_ceiling_share_is_null_without_a_ceiling_and_at_chance() -> None:
    assert with_ceiling_shares([measured("matched", 70.0)], 10)[0]["ceiling_share"] is None
    at_chance = [measured("real", 10.0), measured("matched", 70.0)]
    assert [r["ceiling_share"] for r in with_ceiling_shares(at_chance, 10)] == [None, None]


def test_deviation_is_over_seeds_with_ddof_1_and_null_for_one_seed() -> None:
    assert measured("gan", 50.0)["std"] == pytest.approx(2**0.5)
    row = Row("gan", "convnet", "fixed", "hard", 1)
    assert result(row, budget(settings(), manifest(), row), [0], [50.0], 10)["std"] is None


# check


def test_check_names_the_class_that_is_too_small_for_a_fixed_real_set() -> None:
    with pytest.raises(
        UserError, match=r"--report.ipc 8 is more than the 7 training images of class class 2; lower it"
    ):
        check(settings(ipc=(1, 8)), manifest(9, 8, 7))
    check(settings(ipc=(7,)), manifest(9, 8, 7))
    check(settings(ipc=(8,), protocol=("regenerate",)), manifest(9, 8, 7))
    check(settings(ipc=(8,), baselines=("gan",)), manifest(9, 8, 7))


@pytest.mark.parametrize("wrong", [{"students": ("convnit",)}, {"protocol": ("fix",)}, {"labels": ("softer",)}])
def test_check_refuses_unknown_names(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="known"):
        check(settings(**wrong), manifest())


# what a student sees


def test_real_images_come_all_before_any_comes_again() -> None:
    members = [np.arange(0, 7), np.arange(7, 20)]
    slots = np.arange(2 * 3 * 20)  # 20 sets of 3 a class
    samples = real_samples(0, "p", slots, 3, members).reshape(20, 2, 3)
    for c, own in enumerate(members):
        sequence = samples[:, c].ravel()
        assert set(sequence) == set(own)
        for k in range(len(sequence) // len(own)):
            assert sorted(sequence[k * len(own) : (k + 1) * len(own)]) == own.tolist()


def sets(made: Made, train_on: str, protocol: str, seed: int = 0, ipc: int = 2) -> Sets:
    ctx = made.context(settings(ipc=(ipc,)))
    return Sets(ctx, Frozen(ctx, made.dirs), Row(train_on, "convnet:8", protocol, "hard", ipc), seed)


@pytest.mark.parametrize("train_on", ["real", "gan", "matched"])
def test_fixed_sees_one_set_again_and_again_and_regenerate_fresh_ones(made: Made, train_on: str) -> None:
    def epoch(s: Sets, e: int) -> tuple[set[bytes], list[int]]:
        images, labels = s.take(np.arange(e * s.images, (e + 1) * s.images))
        return {image.numpy().tobytes() for image in images}, np.bincount(labels, minlength=10).tolist()

    fixed, fresh = sets(made, train_on, "fixed"), sets(made, train_on, "regenerate")
    first, counts = epoch(fixed, 0)
    assert epoch(fixed, 1)[0] == first
    assert counts == [2] * 10
    assert epoch(fresh, 0)[1] == epoch(fresh, 1)[1] == [2] * 10
    assert not epoch(fresh, 0)[0] & epoch(fresh, 1)[0]
    assert epoch(sets(made, train_on, "fixed", seed=1), 0)[0] != first


@pytest.mark.parametrize("protocol", ["regenerate", "fixed"])
def test_what_a_student_sees_does_not_depend_on_how_it_is_cut(made: Made, protocol: str) -> None:
    whole, labels = sets(made, "matched", protocol).take(np.arange(50))
    parts = [sets(made, "matched", protocol).take(np.arange(a, b)) for a, b in ((0, 7), (7, 33), (33, 50))]
    assert labels.tolist() == np.concatenate([p[1] for p in parts]).tolist()
    # A convolution of another batch size may sum in another order: one level of 255 at most.
    difference = whole.int() - torch.cat([p[0] for p in parts]).int()
    assert int(difference.abs().max()) <= 1


def test_gan_and_matched_students_get_the_same_latents_labels_and_order(made: Made) -> None:
    swapped = {**made.dirs, "matching": made.dirs["gan"]}
    ctx = made.context(settings())
    frozen = Frozen(ctx, swapped)
    a, b = (Sets(ctx, frozen, Row(k, "convnet:8", "regenerate", "hard", 1), 0) for k in ("gan", "matched"))
    assert torch.equal(a.take(np.arange(30))[0], b.take(np.arange(30))[0])


def test_soft_labels_are_the_mean_of_the_last_teachers_softened_answers(made: Made) -> None:
    ctx = made.context(settings())
    frozen = Frozen(ctx, made.dirs)
    x = to_float(ctx.images("train").read(np.arange(5)), ctx.device)
    assert len(frozen.teachers) == 2
    logits = [t(x).detach().numpy() / 2.5 for t in frozen.teachers]
    expected = np.mean([np.exp(v) / np.exp(v).sum(1, keepdims=True) for v in logits], axis=0)
    np.testing.assert_allclose(frozen.soft_labels(x, 2.5).numpy(), expected, atol=1e-6)


def test_real_rows_see_as_many_distinct_images_as_they_say(made: Made) -> None:
    config = settings(ipc=(40,), epochs=4, seeds=1, baselines=("real", "full"), full_epochs=2, protocol=("regenerate",))
    ctx = made.context(config)
    images = ctx.images("train")
    for job in jobs(config, made.manifest, "float32", made.fingerprints):
        if job.row.train_on == "matched" or job.row.labels == "soft":
            continue
        asked: list[np.ndarray] = []
        read = images.read
        images.read = lambda indices, out=None: (asked.append(indices), read(indices, out))[1]  # type: ignore[method-assign, func-returns-value]  # noqa: B023
        try:
            _, distinct = train(ctx, Frozen(ctx, made.dirs), job)
        finally:
            images.read = read  # type: ignore[method-assign]
        seen = np.concatenate(asked)
        assert len(seen) == job.budget.images_seen
        assert len(np.unique(seen)) == distinct <= job.budget.distinct_images_seen


def test_golden_accuracy(made: Made) -> None:
    """Fails when the numbers of rows change: then raise rows.VERSION and give the new values here."""
    config = settings(
        ipc=(5,), epochs=40, seeds=1, students=("convnet:16",), protocol=("regenerate",), labels=("hard",)
    )
    ctx = made.context(config)
    found = {j.row.train_on: j for j in jobs(config, made.manifest, "float32", made.fingerprints)}
    accuracies = [train(ctx, Frozen(ctx, made.dirs), found[kind])[0] for kind in ("real", "gan")]
    assert accuracies == pytest.approx([69.4, 11.9], abs=4.0)


# every student once


@pytest.fixture(scope="module")
def results(made: Made, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path, int]:
    store = tmp_path_factory.mktemp("store")
    ctx = made.context(settings(), store)
    return rows_of(ctx, made), store, ctx.forwards


def test_every_row_has_its_keys_budget_and_accuracies(results: tuple[list[dict[str, Any]], Path, int]) -> None:
    rows, _, _ = results
    keys = (
        "train_on student protocol labels ipc optimizer_steps batch images_seen distinct_images_seen "
        "mean std seeds accuracies ceiling_share"
    )
    assert len(rows) == 13
    for r in rows:
        assert list(r) == keys.split()
        assert r["seeds"] == [0, 1]
        assert r["mean"] == pytest.approx(np.mean(r["accuracies"]))
        assert all(0 <= a <= 100 for a in r["accuracies"])
    json.dumps(rows, allow_nan=False)


def test_the_first_call_forwards_what_the_jobs_say(made: Made, results: tuple[Any, Path, int]) -> None:
    config = settings()
    all_jobs = jobs(config, made.manifest, "float32", made.fingerprints)
    test = made.manifest.splits["test"].samples
    assert results[2] == sum(images_forwarded(j, 2, test) for j in all_jobs)


def test_the_second_call_forwards_no_image(made: Made, results: tuple[Any, Path, int]) -> None:
    ctx = made.context(settings(), results[1])
    assert rows_of(ctx, made) == results[0]
    assert ctx.forwards == 0


def test_another_generator_trains_matched_students_alone(made: Made, results: tuple[Any, Path, int]) -> None:
    ctx = made.context(settings(), results[1])
    other = dataclasses.replace(made, fingerprints={**made.fingerprints, "matching": "f" * 16})
    rows = rows_of(ctx, other)
    assert rows == results[0]  # the same generator under another name
    wanted = [j for j in jobs(settings(), made.manifest, "float32", other.fingerprints) if j.row.train_on == "matched"]
    assert ctx.forwards == sum(images_forwarded(j, 2, made.manifest.splits["test"].samples) for j in wanted)


def test_a_damaged_record_is_named_and_its_student_alone_trained_anew(
    made: Made, results: tuple[Any, Path, int], capsys: pytest.CaptureFixture[str]
) -> None:
    ctx = made.context(settings(), results[1])
    job = jobs(settings(), made.manifest, "float32", made.fingerprints)[3]
    path = record_path(ctx, job)
    before = path.read_text()
    path.write_text(before.replace('"accuracy": ', '"accuracy": 1'))
    assert rows_of(ctx, made) == results[0]
    assert str(path) in capsys.readouterr().err
    assert path.read_text() == before
    assert ctx.forwards == images_forwarded(job, 2, made.manifest.splits["test"].samples)


# the program


def test_the_program_reads_a_run_and_writes_evaluate_json(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        str(made.out),
        "--ipc",
        "1",
        "3",
        "--labels",
        "hard",
        "--protocol",
        "fixed",
        "--epochs",
        "1",
        "--device",
        "cpu",
    ]
    program.main([*argv, "--baselines", "gan"], lambda _world: None)
    document = json.loads((made.out / program.FILE).read_text())
    assert document["format"] == "gdd-report/1"
    assert document["fingerprints"]["generator"] == made.fingerprints["matching"]
    assert [(r["train_on"], r["ipc"], r["optimizer_steps"]) for r in document["results"]] == [
        ("gan", 1, 1),
        ("matched", 1, 1),
        ("gan", 3, 1),
        ("matched", 3, 1),
    ]
    out = capsys.readouterr().out
    assert "ceiling share" in out
    assert str(made.out / program.FILE) in out


def test_a_changed_generator_file_is_named(made: Made, tmp_path: Path) -> None:
    fresh = make(tmp_path / "out", made.data)
    path = fresh.dirs["matching"] / "generator.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"generator.safetensors is damaged"):
        program.main([str(fresh.out), "--device", "cpu"], lambda _world: None)


def test_other_data_and_unfinished_runs_are_refused(made: Made, tmp_path: Path) -> None:
    other = dataclasses.replace(made.manifest, name="other")
    with pytest.raises(UserError, match="is not the one that .* was trained on"):
        program.finished_steps(made.out, other)
    with pytest.raises(UserError, match="holds no finished generator"):
        program.finished_steps(tmp_path, made.manifest)


@pytest.mark.parametrize(
    ("argv", "said"),
    [(["nowhere"], "nowhere is no run"), ([], "required: OUT"), (["OUT", "--ipc", "0"], "--report.ipc 0 is too small")],
)
def test_wrong_use_is_one_line(made: Made, argv: list[str], said: str) -> None:
    argv = [str(made.out) if a == "OUT" else a for a in argv]
    with pytest.raises(UserError, match=said) as error:
        program.main(argv, lambda _world: None)
    assert "\n" not in str(error.value)


def test_the_program_exits_with_2_after_one_error_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gdd_dist.evaluate", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: {tmp_path} is no run (config.yaml is missing); give the --out of a finished gdd_dist.train"
    ]
