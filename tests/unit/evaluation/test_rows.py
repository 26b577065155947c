"""Rows, as pure functions: which there are, their budgets, fingerprints and results, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from made_runs import FINGERPRINTS, settings

from gdd_dist.config.settings import Config, Loader, Matching
from gdd_dist.evaluation.confusion import StudentResult
from gdd_dist.evaluation.rows import Row, budget, check, jobs, plan, result, step_bounds, with_ceiling_shares
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


# rows


def test_plan_holds_every_combination_once_and_full_once_a_student() -> None:
    config = settings(ipc=(1, 2, 1), students=("convnet:8", "alexnet:8"))
    rows = [r for r in plan(config) if r.augmented]
    assert len(rows) == len(set(rows)) == 2 * (1 + 2 * (2 * 2 * 4 + 2))  # equal_bytes is drawn anew alone
    assert [r for r in rows if r.train_on == "full"] == [
        Row("full", "convnet:8", None, "hard", None),
        Row("full", "alexnet:8", None, "hard", None),
    ]


def test_each_row_that_draws_stands_beside_its_chosen_one() -> None:
    rows = plan(settings(protocol=("regenerate",), labels=("hard",), select=(1, 3)))
    assert [(r.train_on, r.select) for r in rows if r.ipc] == [
        *((kind, n) for kind in ("real",) for n in (1, 3)),
        ("equal_bytes", 1),
        *((kind, n) for kind in ("gaussian", "gan", "matched") for n in (1, 3)),
    ]
    assert {"teachers" in r.reads for r in rows if r.select == 3} == {True}
    plain, both = (row_prints(settings(select=n)) for n in ((1,), (1, 3)))
    assert plain.items() <= both.items()  # a choice beside it leaves a row's students known
    drawn = {row: p for row, p in both.items() if row.select == 3}
    assert drawn.items() <= row_prints(settings(select=(3,))).items()


def test_a_fixed_row_of_a_generator_stands_beside_its_condensed_one() -> None:
    config = settings(labels=("hard",), select=(1, 3), condense=5)
    moved = [r for r in plan(config) if r.condense]
    assert [(r.train_on, r.protocol, r.select, r.condense) for r in moved] == [
        (kind, "fixed", 1, 5) for kind in ("gaussian", "gan", "matched")
    ]
    assert {"teachers" in r.reads for r in moved} == {True}
    plain, both = row_prints(settings(select=(1, 3))), row_prints(settings(select=(1, 3), condense=5))
    assert plain.items() <= both.items()
    assert not {both[r] for r in both if r.condense} & {p for r, p in both.items() if not r.condense}


def test_the_ceiling_and_the_scores_are_those_of_what_is_drawn() -> None:
    rows = [measured("real", 50.0), {**measured("real", 60.0), "select": 3}, {**measured("matched", 30.0), "select": 3}]
    assert [r["ceiling_share"] for r in with_ceiling_shares(rows, 10)] == [1.0, 1.25, 0.5]


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
    assert changed_rows(base, other) == {r for r in base if r.train_on in ("matched", "equal_bytes")}


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
    assert len(few) == 2 * (19 + 4)
    assert few < many
    assert not few & {j.fingerprint for j in jobs(settings(seeds=2), manifest(), "bf16", FINGERPRINTS)}


def test_for_the_ars_the_fixed_rows_of_real_and_matched_images_come_once_more_without_augmentation() -> None:
    def plain(**report: Any) -> list[tuple[str, str, str | None]]:
        return [(r.train_on, r.labels, r.protocol) for r in plan(settings(**report)) if not r.augmented]

    assert plain() == [(k, y, "fixed") for y in ("hard", "soft") for k in ("real", "matched")]
    assert plain(labels=("soft",)) == [("real", "soft", "fixed"), ("matched", "soft", "fixed")]
    assert plain(ars=False) == plain(baselines=("gan",)) == plain(protocol=("regenerate",)) == []
    bare = dataclasses.replace(settings(), loader=Loader(augment="none", flip=False))
    assert all(r.augmented for r in plan(bare))


def test_augmentation_shapes_augmented_rows_alone() -> None:
    base, other = (dataclasses.replace(settings(), loader=Loader(augment=a, flip=False)) for a in ("color", "crop"))
    m = manifest()
    first, second = ({j.row: j.fingerprint for j in jobs(c, m, "float32", FINGERPRINTS)} for c in (base, other))
    assert {r for r in first if first[r] == second[r]} == {r for r in first if not r.augmented}


# results


def measured(train_on: str, mean: float, labels: str = "hard", protocol: str = "regenerate") -> dict[str, Any]:
    row = Row(train_on, "convnet", protocol, labels, 1)
    return result(
        row, budget(settings(), manifest(), row), [0, 1], [StudentResult(m, m, 10) for m in (mean - 1, mean + 1)]
    )


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
    assert result(row, budget(settings(), manifest(), row), [0], [StudentResult(50.0, 50.0, 10)])["std"] is None


# check


def test_check_names_the_class_that_is_too_small_for_a_fixed_real_set() -> None:
    with pytest.raises(
        UserError, match=r"--report.ipc 8 is more than the 7 training images of class class 2; lower it"
    ):
        check(settings(ipc=(1, 8)), manifest(9, 8, 7))
    check(settings(ipc=(7,)), manifest(9, 8, 7))
    check(settings(ipc=(8,), protocol=("regenerate",)), manifest(9, 8, 7))
    check(settings(ipc=(8,), baselines=("gan",)), manifest(9, 8, 7))


def test_check_refuses_an_unknown_student() -> None:
    with pytest.raises(UserError, match="known"):
        check(settings(students=("convnit",)), manifest())
