"""What the report shows beside its rows, against numbers computed another way."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gdd_dist.evaluation import confusion, ddranking
from gdd_dist.evaluation.rows import Row
from gdd_dist.reporting import diagnostic_figures, diagnostics, training_figures

# confusion


def test_a_confusion_matrix_counts_the_row_for_the_truth_and_keeps_its_bytes() -> None:
    labels, answers = np.array([0, 0, 0, 1, 2]), np.array([0, 0, 2, 1, 0])
    matrix = confusion.confusion(labels, answers, 3)
    assert matrix.tolist() == [[2, 0, 1], [0, 1, 0], [1, 0, 0]]
    assert confusion.accuracy(matrix) == pytest.approx(60.0)
    assert confusion.by_class(matrix).tolist() == pytest.approx([200 / 3, 100.0, 0.0])
    assert confusion.balanced(matrix) == pytest.approx((200 / 3 + 100) / 3)
    assert np.array_equal(confusion.unpack(confusion.pack(matrix)), matrix)


def test_a_class_without_images_counts_nowhere() -> None:
    matrix = np.array([[3, 1], [0, 0]])
    assert np.isnan(confusion.by_class(matrix)[1])
    assert confusion.balanced(matrix) == 75.0


# DD-Ranking


def row(train_on: str, mean: float, labels: str = "hard", protocol: str | None = "fixed", **more: object) -> dict:
    return {
        "train_on": train_on,
        "student": "s",
        "protocol": protocol,
        "labels": labels,
        "ipc": 1,
        "mean": mean,
        **more,
    }


def test_lrs_and_ars_are_the_formulas_of_their_authors() -> None:
    """Written out once more: alpha = w IOR - (1 - w) HLR, beta = g aug + (1 - g) plain, both through (e^x - 1/e) / (e - 1/e)."""
    rows = [
        {**row("full", 80.0, protocol=None), "ipc": None},
        row("real", 30.0),
        row("matched", 50.0),
        row("real", 45.0, "soft"),
        row("matched", 60.0, "soft"),
        row("real", 20.0, augmented=False),
        row("matched", 44.0, augmented=False),
    ]
    found = {(r["train_on"], r["labels"]): r for r in ddranking.with_scores(rows)}
    assert len(found) == 5
    through = lambda x: (math.e**x - 1 / math.e) / (math.e - 1 / math.e)  # noqa: E731
    assert found["matched", "hard"]["lrs"] == pytest.approx(through(0.5 * 0.20 - 0.5 * 0.30))
    assert found["matched", "soft"]["lrs"] == pytest.approx(through(0.5 * 0.15 - 0.5 * 0.30))
    assert found["matched", "hard"]["ars"] == pytest.approx(through(0.5 * 0.20 + 0.5 * 0.24))
    assert "ars" not in found["matched", "soft"]
    assert "lrs" not in found["real", "hard"]
    assert "lrs" not in ddranking.with_scores([row("matched", 50.0)])[0]


def test_scores_run_from_0_to_1() -> None:
    assert [ddranking.score(x) for x in (-1, 1)] == pytest.approx([0.0, 1.0])


# nearest neighbours


def test_nearest_finds_what_brute_force_finds_whatever_the_chunks() -> None:
    rng = np.random.default_rng(0)
    train, queries = rng.integers(0, 256, (50, 1, 6, 6), np.uint8), rng.integers(0, 256, (7, 1, 6, 6), np.uint8)
    queries[3] = train[17]
    cpu = torch.device("cpu")
    q, x = (diagnostics.flat(torch.from_numpy(a), cpu) for a in (queries, train))
    apart = np.sqrt(((queries[:, None].astype(float) - train[None]) ** 2).reshape(7, 50, -1).mean(2))
    for size in (50, 13, 2):
        distances, places = diagnostics.nearest(q, iter(x.split(size)), 3)
        assert np.array_equal(places, np.argsort(apart, 1)[:, :3])
        np.testing.assert_allclose(distances, np.sort(apart, 1)[:, :3], atol=0.1)
    assert places[3, 0] == 17


def test_larger_images_are_averaged_down_before_they_are_compared() -> None:
    image = torch.arange(64 * 64, dtype=torch.float32).remainder(256).to(torch.uint8).view(1, 1, 64, 64)
    small = diagnostics.flat(image, torch.device("cpu")).view(32, 32)
    assert float(small[0, 0]) == pytest.approx(float(image[0, 0, :2, :2].float().mean()) - 127.5)


def near(generated: np.ndarray) -> diagnostics.Near:
    held_out = np.linspace(10, 30, 101)
    return diagnostics.Near(generated, held_out, np.zeros((2, 4, 8, 8, 3), np.uint8), np.zeros((2, 4), np.int64))


def test_copies_are_close_and_new_images_are_not() -> None:
    assert diagnostics.summary(near(np.zeros(50)))["close_share"] == 100.0
    assert diagnostics.summary(near(np.full(50, 20.0)))["close_share"] == 0.0


# answers


def test_answers_are_standardized_and_parted_by_class() -> None:
    logits = np.array([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]], np.float32)
    found = diagnostics.split_answers(logits, np.array([2, 0]))
    z = (logits - logits.mean(1, keepdims=True)) / logits.std(1, ddof=1, keepdims=True)
    np.testing.assert_allclose(found.own, [z[0, 2], z[1, 0]], atol=1e-5)
    np.testing.assert_allclose(found.others, [z[0, 0], z[0, 1], z[1, 1], z[1, 2]], atol=1e-5)


# which rows, which classes, and that pictures hold together


def test_the_matrices_are_those_of_the_first_matched_rows_budget() -> None:
    rows = [
        Row("full", "s", None, "hard", None),
        *(Row(k, "s", p, "hard", 1) for p in ("regenerate", "fixed") for k in ("real", "gan", "matched")),
        Row("matched", "s", "fixed", "hard", 1, augmented=False),
    ]
    matrices = {r: np.full((2, 2), i) for i, r in enumerate(rows)}
    first, found = diagnostics.first_group(matrices)
    assert first == rows[3]
    assert {k: m[0, 0] for k, m in found.items()} == {"real": 1, "gan": 2, "matched": 3}


def test_of_many_classes_those_that_changed_most_are_shown() -> None:
    assert list(diagnostics.extremes(np.array([3.0, -1.0, 2.0]), 24)) == [1, 2, 0]
    change = np.arange(100.0) - 50
    assert list(diagnostics.extremes(change, 4)) == [0, 1, 98, 99]
    assert list(diagnostics.extremes(np.array([np.nan, -1.0]), 2)) == [1, 0]


@pytest.mark.parametrize("classes", [2, 10, 200])
def test_pictures_are_drawn_for_few_and_many_classes_with_long_names(classes: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    matrices = {k: rng.integers(0, 9, (classes, classes)) for k in ("real", "gan", "matched")}
    answers = {k: diagnostics.Answers(rng.normal(2, 1, 50), rng.normal(-0.2, 1, 450)) for k in matrices}
    shown, labels = rng.integers(0, 256, (2, 4, 8, 8, 3), np.uint8), rng.integers(0, classes, (2, 4))
    found = diagnostics.Evidence(
        Row("matched", "s", "fixed", "hard", 1),
        matrices,
        answers,
        diagnostics.Near(rng.normal(20, 2, 50), rng.normal(20, 2, 50), shown, labels),
    )
    names = [f"{'a long name of a class ' * 3}<{c}> $x_{c}$" for c in range(classes)]
    for name, figure in diagnostic_figures.gallery(found, names).items():
        (tmp_path / name).write_bytes(training_figures.png(figure))
        with Image.open(tmp_path / name) as image:
            assert max(image.size) < 4000
            assert np.asarray(image.convert("L")).std() > 5
    alone = diagnostic_figures.confusion_figure({"matched": matrices["matched"]}, names)
    assert len(alone.axes) == 2
