"""The report's first screen: the answer, the differences behind it, the picture."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy.stats import t, ttest_rel

from gdd_dist.reporting.accuracy_picture import picture
from gdd_dist.reporting.verdict import (
    CEILING,
    FLOOR,
    T_95,
    TRIVIAL,
    Difference,
    answer,
    comparison,
    difference,
    differences,
    first_screen,
    said,
)


def row(train_on: str, *accuracies: float, **changed: Any) -> dict[str, Any]:
    return {
        "train_on": train_on,
        "student": "convnet",
        "protocol": "regenerate",
        "labels": "hard",
        "ipc": 1,
        "mean": float(np.mean(accuracies)),
        "std": float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else None,
        "seeds": list(range(len(accuracies))),
        "accuracies": list(accuracies),
        **changed,
    }


ROWS = [
    row("full", 98.0, 98.2, 98.4, protocol=None, ipc=None),
    row("real", 97.0, 96.0, 98.0),
    row("gaussian", 90.0, 94.0, 92.0),
    row("gan", 85.0, 84.0, 86.5),
    row("matched", 93.0, 92.0, 94.0),
    row("matched", 95.0, 94.0, 96.0, select=3),
    row("real", 60.0, 50.0, 70.0, protocol="fixed"),
    row("matched", 80.0, 81.0, 82.0, protocol="fixed"),
    row("matched", 99.0, 99.0, 99.0, student="resnet18"),
]


def test_differences_are_those_of_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    seen = set()
    for pairs in (2, 3, 4, 8, 11):
        for shift in (0.0, 0.3, 1.0, 3.0):
            ours, other = rng.normal(shift, 1, pairs), rng.normal(0, 1, pairs)
            d, wanted = difference(row("matched", *ours), row("gan", *other)), ttest_rel(ours, other)
            assert d.mean == pytest.approx(np.mean(ours - other))
            assert d.stderr is not None
            assert d.mean / d.stderr == pytest.approx(wanted.statistic)
            assert d.shown == (wanted.pvalue < 0.05)
            seen.add(d.shown)
    assert seen == {True, False}


def test_the_quantiles_are_those_of_students_t() -> None:
    assert pytest.approx([t.ppf(0.975, i + 1) for i in range(len(T_95))], abs=1e-3) == T_95


def test_students_are_paired_by_seed_whatever_their_order() -> None:
    ours = row("matched", 93.0, 92.0, 94.0)
    other = row("gan", 84.0, 83.0, 70.0, seeds=[1, 0, 9])
    assert difference(ours, other) == Difference(9.0, 1.0, 2)
    with pytest.raises(ValueError, match="no student seed"):
        difference(ours, row("gan", 1.0, seeds=[7]))


def test_one_student_shows_nothing() -> None:
    d = difference(row("matched", 93.0), row("gan", 10.0))
    assert (d.stderr, str(d), said(d)) == (None, "+83.0", "not shown")


def test_the_first_screen_holds_the_rows_of_one_budget_between_floor_and_ceiling() -> None:
    shown = first_screen(ROWS)
    assert list(shown) == [FLOOR, TRIVIAL, "gan", "matched", "matched, best of 3", CEILING]
    assert shown["matched"] is ROWS[4]
    soft = [row("real", 99.0, labels="soft"), row("matched", 95.0, labels="soft"), *ROWS]
    assert first_screen(soft)[CEILING] is ROWS[1], "the ceiling is that of hard labels"


@pytest.mark.parametrize(
    ("gan", "gaussian", "said"),
    [
        (
            (85.0, 84.0, 86.5),
            (80.0, 79.0, 81.5),
            "Yes.** The matched generator: better than the GAN before matching and the tri",
        ),
        (
            (85.0, 84.0, 86.5),
            (90.0, 94.0, 92.0),
            "In part.** The matched generator: better than the GAN before matching; no diff",
        ),
        (
            (93.0, 92.5, 93.0),
            (90.0, 94.0, 92.0),
            "Not shown.** The matched generator: no difference beyond noise from the GAN",
        ),
        (
            (85.0, 84.0, 86.5),
            (96.0, 95.1, 97.0),
            "No.** The matched generator: better than the GAN before matching; worse than the tri",
        ),
    ],
)
def test_the_answer_says_what_is_shown(gan: tuple[float, ...], gaussian: tuple[float, ...], said: str) -> None:
    rows = [row("gan", *gan), row("gaussian", *gaussian), row("matched", 93.0, 92.0, 94.0)]
    assert said in answer(differences(first_screen(rows)))


def test_the_table_names_every_other_row() -> None:
    text = comparison(differences(first_screen(ROWS)))
    assert "| the GAN before matching | +7.8 ± 0.2 | shown |" in text
    assert re.search(r"\| the trivial generator, .* \| \+1.0 ± 1.5 \| not shown \|", text)
    assert "| matched, best of 3 | -2.0 ± 0.0 | shown: worse |" in text
    assert "over 3 pairs" in text


def test_the_picture_shows_every_row_where_its_accuracy_is() -> None:
    shown = first_screen(ROWS)
    root = ElementTree.fromstring(picture(shown, 10.0))
    space = "{http://www.w3.org/2000/svg}"
    texts = [node.text or "" for node in root.iter(f"{space}text")]
    bars = [float(node.attrib["width"]) for node in root.iter(f"{space}rect")]
    means = [r["mean"] for r in shown.values()]
    for label, r in shown.items():
        assert label in texts
        assert f"{r['mean']:.1f} ± {r['std']:.1f} %" in texts
    assert np.allclose(np.array(bars) / (np.array(means) - 10), bars[0] / (means[0] - 10), rtol=0.01)
    assert len(list(root.iter(f"{space}circle"))) == 3 * len(shown)
    assert len([n for n in root.iter(f"{space}line") if n.get("class") == "d"]) == 2 * len(shown)


def test_accuracies_below_chance_stay_in_the_picture() -> None:
    root = ElementTree.fromstring(picture(first_screen([row("matched", 8.0, 30.0)]), 25.0))
    width = float(root.attrib["viewBox"].split()[2])
    places = [float(n.attrib["cx"]) for n in root.iter("{http://www.w3.org/2000/svg}circle")]
    assert all(0 < x < width for x in places)
    assert len(set(places)) == 2
