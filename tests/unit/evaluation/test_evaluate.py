"""What students see; every student trained once; python -m gdd_dist.evaluate."""

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
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from made_runs import Made, make, settings

from gdd_dist import evaluate as program
from gdd_dist.data.images import to_float
from gdd_dist.data.order import Recent
from gdd_dist.evaluation.job_images import images_forwarded
from gdd_dist.evaluation.rows import Row, jobs
from gdd_dist.evaluation.student_results import confusions, costs, evaluate, record_path, with_bytes
from gdd_dist.evaluation.students import Frozen, Sets, real_samples, train
from gdd_dist.models.files import GENERATOR, load_generator_network, save_network
from gdd_dist.pipeline.finished_run import finished_steps
from gdd_dist.training.condense import START, condensed
from gdd_dist.training.context import Context
from sharding.errors import UserError


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests share few cores."""
    monkeypatch.setattr("gdd_dist.runtime.world.World.threads", 1)


@pytest.fixture(scope="module")
def made(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("evaluate") / "out", digits)


class Quiet:
    """A monitor that shows nothing."""

    def already(self, done: int) -> None: ...

    def advance(self, done: int, note: str = "", images: int = 0) -> None: ...


def rows_of(ctx: Context, made: Made) -> list[dict[str, Any]]:
    return evaluate(ctx, made.dirs, made.fingerprints, Quiet())  # type: ignore[arg-type]


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


@pytest.mark.parametrize("train_on", ["real", "matched"])
@pytest.mark.parametrize("protocol", ["regenerate", "fixed"])
def test_a_chosen_row_shows_of_each_places_draws_the_one_that_the_teachers_like_best(
    made: Made, train_on: str, protocol: str
) -> None:
    ctx = made.context(settings(ipc=(2,)))
    frozen, row = Frozen(ctx, made.dirs), Row(train_on, "convnet:8", protocol, "hard", 2)
    plain = Sets(ctx, frozen, row, 0)
    chosen = Sets(ctx, frozen, dataclasses.replace(row, select=3), 0)
    slots, places = np.arange(20), np.arange(20)
    draws = torch.stack([plain._drawn(slots, n) for n in range(3)])
    labels = slots // 2
    answers = [frozen.soft_labels(to_float(d, ctx.device), 1.0).numpy()[np.arange(20), labels] for d in draws]
    best = np.argmax(answers, axis=0)
    assert len(set(best)) > 1
    order = chosen._members(places)
    images, given = chosen.take(places)
    assert given.tolist() == labels[order].tolist()
    assert torch.equal(images, draws[torch.from_numpy(best), torch.arange(20)][torch.from_numpy(order)])
    assert torch.equal(plain.take(places)[0], draws[0][torch.from_numpy(order)])  # the first draw is the plain row's


def test_a_condensed_set_begins_at_the_teachers_choice_and_costs_what_its_job_says(made: Made) -> None:
    config = settings(labels=("hard",), protocol=("fixed",), ipc=(2,), condense=3)
    job = next(j for j in jobs(config, made.manifest, "float32", made.fingerprints) if j.row.condense)
    ctx = made.context(config)
    frozen = Frozen(ctx, made.dirs)
    train(ctx, frozen, job)
    assert ctx.forwards == images_forwarded(job, 2, made.manifest)
    best = Sets(ctx, frozen, dataclasses.replace(job.row, condense=0, select=START), 0).only[0]
    unmoved, moved, again = (
        condensed(ctx, frozen.generator(job.row.train_on), frozen.teachers, 2, 0, "report/fixed/2/0", steps)
        for steps in (0, 3, 3)
    )
    assert torch.equal(unmoved, best)
    assert torch.equal(moved, again)
    assert not torch.equal(moved, unmoved)


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


def test_the_fixed_set_without_augmentation_is_labelled_once_as_each_epoch_would_be(made: Made) -> None:
    ctx = made.context(settings(ipc=(2,)))
    row = Row("matched", "convnet:8", "fixed", "soft", 2, augmented=False)
    plain, moved = (Sets(ctx, Frozen(ctx, made.dirs), r, 0) for r in (row, dataclasses.replace(row, augmented=True)))
    for first in (0, 13, 45):
        places = np.arange(first, first + 25)
        seen = to_float(plain.take(places)[0], ctx.device)
        before = ctx.forwards
        labels = plain.soft_labels(places, seen)
        assert ctx.forwards - before == (0 if first else 2 * plain.images)
        torch.testing.assert_close(labels, moved.soft_labels(places, seen), atol=1e-6, rtol=0)


def test_what_the_teachers_choose_costs_their_answers_also_where_no_labels_are_soft(made: Made) -> None:
    config = settings(labels=("hard",), protocol=("regenerate",), select=(1, 3))
    students = jobs(config, made.manifest, "float32", made.fingerprints)
    found = costs(made.context(config), students, made.dirs["teachers"])
    drawn = [j for j in students if j.row.train_on == "matched" and j.seed == 0]
    plain, chosen = (found[j.fingerprint] for j in drawn)
    assert [j.row.select for j in drawn] == [1, 3]
    assert chosen > plain


def test_bytes_count_all_that_must_be_kept_to_train_such_a_student(made: Made) -> None:
    ctx = made.context(settings())
    shards = ctx.images("train").shards
    mean = shards.payload_bytes / shards.samples
    generator = (made.dirs["gan"] / "generator.safetensors").stat().st_size
    teachers = sum((made.dirs["teachers"] / f"teacher-{i:03d}.safetensors").stat().st_size for i in (1, 3))
    drawn = {"train_on": "gan", "labels": "hard", "distinct_images_seen": 40}
    rows = [
        drawn,
        {**drawn, "labels": "soft"},
        {**drawn, "select": 3},
        {**drawn, "condense": 5},
        {**drawn, "train_on": "real"},
        {**drawn, "train_on": "real", "select": 3},  # all are kept that may be chosen
    ]
    asked = generator + teachers
    expected = [generator, asked, asked, asked, round(40 * mean), round(120 * mean) + teachers]
    assert [r["bytes"] for r in with_bytes(ctx, made.dirs, rows)] == expected


@settings_of_hypothesis(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 4), st.lists(st.integers(0, 300), max_size=30)
)
def test_kept_permutations_change_no_real_sample(sizes: list[int], ipc: int, slots: list[int]) -> None:
    ends = np.cumsum(sizes)
    members = [np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    recent = Recent(2 * int(ends[-1]))
    for asked in (np.array(slots, np.int64), np.arange(50)):
        expected = real_samples(0, "p", asked, ipc, members)
        assert real_samples(0, "p", asked, ipc, members, recent).tolist() == expected.tolist()


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
        images.read = lambda indices: (asked.append(indices), read(indices))[1]  # type: ignore[method-assign, func-returns-value]  # noqa: B023
        try:
            distinct = train(ctx, Frozen(ctx, made.dirs), job)[0].distinct
        finally:
            images.read = read  # type: ignore[method-assign]
        seen = np.concatenate(asked)
        assert len(seen) == job.budget.images_seen
        assert len(np.unique(seen)) == distinct <= job.budget.distinct_images_seen


def test_golden_accuracy(made: Made) -> None:
    """Fails when the numbers of rows change: then raise ROWS_VERSION and give the new values here."""
    config = settings(
        ipc=(5,), epochs=40, seeds=1, students=("convnet:16",), protocol=("regenerate",), labels=("hard",)
    )
    ctx = made.context(config)
    found = {j.row.train_on: j for j in jobs(config, made.manifest, "float32", made.fingerprints)}
    accuracies = [train(ctx, Frozen(ctx, made.dirs), found[kind])[0].accuracy for kind in ("real", "gan")]
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
        "mean std seeds accuracies ceiling_share balanced_mean lrs ars bytes"
    )
    assert len(rows) == 19
    for r in rows:
        assert list(r) == keys.split()
        assert r["seeds"] == [0, 1]
        assert r["mean"] == pytest.approx(np.mean(r["accuracies"]))
        assert all(0 <= a <= 100 for a in r["accuracies"])
    json.dumps(rows, allow_nan=False)


def test_the_first_call_forwards_what_the_jobs_say(made: Made, results: tuple[Any, Path, int]) -> None:
    config = settings()
    all_jobs = jobs(config, made.manifest, "float32", made.fingerprints)
    assert results[2] == sum(images_forwarded(j, 2, made.manifest) for j in all_jobs)


def test_the_second_call_forwards_no_image(made: Made, results: tuple[Any, Path, int]) -> None:
    ctx = made.context(settings(), results[1])
    assert rows_of(ctx, made) == results[0]
    assert ctx.forwards == 0


def test_another_generator_trains_matched_students_alone(made: Made, results: tuple[Any, Path, int]) -> None:
    ctx = made.context(settings(), results[1])
    other = dataclasses.replace(made, fingerprints={**made.fingerprints, "matching": "f" * 16})
    rows = rows_of(ctx, other)
    assert rows == results[0]  # the same generator under another name
    wanted = [j for j in jobs(settings(), made.manifest, "float32", other.fingerprints) if "matching" in j.row.reads]
    assert ctx.forwards == sum(images_forwarded(j, 2, made.manifest) for j in wanted)


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
    assert ctx.forwards == images_forwarded(job, 2, made.manifest)


@pytest.mark.parametrize("kept", ["gan", "gaussian"])
@pytest.mark.parametrize("baseline", [True, False])
def test_a_generator_that_matching_kept_unchanged_trains_its_students_once(
    made: Made, tmp_path: Path, kept: str, baseline: bool
) -> None:
    net, meta = load_generator_network(made.dirs[kept] / GENERATOR)
    best = {"step": 0, "val": 90.0, "stderr": 1.0, "gap": 9.0}
    candidates = {"history": [best]} if kept == "gan" else {"others": {kept: best}}
    save_network(tmp_path / GENERATOR, net, {**meta, **candidates})
    same = dataclasses.replace(made, dirs={**made.dirs, "matching": tmp_path})
    config = settings(baselines=("real", *([kept] if baseline else [])))
    ctx = made.context(config, tmp_path / "store")
    rows = rows_of(ctx, same)
    students = jobs(config, made.manifest, "float32", made.fingerprints)
    counted = [j for j in students if not baseline or j.row.train_on != kept]
    assert ctx.forwards == sum(images_forwarded(j, 2, made.manifest) for j in counted)
    assert set(confusions(ctx, students)) == {j.row for j in students}
    again = made.context(config)
    frozen = Frozen(again, same.dirs)
    for job in (j for j in students if j.row.train_on == "matched" and j.row.augmented and j.seed == 0):
        row = next(
            r
            for r in rows
            if (r["train_on"], r["protocol"], r["labels"]) == ("matched", job.row.protocol, job.row.labels)
        )
        assert row["accuracies"][0] == train(again, frozen, job)[0].accuracy


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
        finished_steps(made.out, other)
    with pytest.raises(UserError, match="holds no finished generator"):
        finished_steps(tmp_path, made.manifest)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nowhere"], "nowhere is not a run"),
        ([], "required: OUT"),
        (["OUT", "--ipc", "0"], "--report.ipc 0 is too small"),
    ],
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
        f"error: {tmp_path} is not a run (config.yaml is missing); give the --out of a gdd_dist.train"
    ]
