"""Who stands in which slot of matching: even, exact, and the same on any number of ranks (design 5.1, 6)."""

import copy
import dataclasses
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gdd_dist.config.settings import Config, Matching
from gdd_dist.data.noise import permutation
from gdd_dist.steps.matching_groups import Dealer, Groups


def dealer(groups=4, group=2, labels=(0, 1, 2) * 5, teachers=3, views=2, seed=0):
    config = dataclasses.replace(Config(seed=seed), matching=Matching(batch=groups * group, group=group))
    return Dealer(config, np.asarray(labels), np.arange(teachers), views)


@st.composite
def dealers(draw):
    classes = draw(st.integers(1, 6))
    counts = draw(st.lists(st.integers(0, 9), min_size=classes, max_size=classes))
    counts[draw(st.integers(0, classes - 1))] += 1
    labels = draw(st.permutations([c for c, n in enumerate(counts) for _ in range(n)]))
    return dealer(
        groups=draw(st.sampled_from([1, 2, 6, 12])),
        group=draw(st.integers(1, 4)),
        labels=labels,
        teachers=draw(st.integers(1, 5)),
        views=draw(st.integers(1, 5)),
        seed=draw(st.integers(0, 3)),
    ), np.array(labels)


def joined(parts):
    return Groups(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Groups)))


@settings(max_examples=60, deadline=None)
@given(dealers(), st.integers(0, 50))
def test_any_world_size_sees_the_same_groups(drawn, step):
    deal, _ = drawn
    whole = deal.batch(step)
    groups = len(whole.classes)
    for world in [w for w in range(1, groups + 1) if groups % w == 0]:
        parts = [deal.batch(step, rank, world) for rank in range(world)]
        assert len({len(p.slots) for p in parts}) == 1
        for field in dataclasses.fields(Groups):
            assert np.array_equal(getattr(joined(parts), field.name), getattr(whole, field.name)), field.name


@settings(max_examples=60, deadline=None)
@given(dealers(), st.integers(0, 50))
def test_a_group_has_one_class_and_its_samples_are_of_it(drawn, step):
    deal, labels = drawn
    batch = deal.batch(step)
    n = len(batch.slots) // len(batch.classes)
    assert np.array_equal(labels[batch.samples], np.repeat(batch.classes, n))
    assert np.array_equal(batch.labels, np.repeat(batch.classes, n))
    assert np.array_equal(batch.slots, np.arange(len(batch.slots)))
    assert batch.samples.dtype == batch.views.dtype == np.int64


@settings(max_examples=60, deadline=None)
@given(dealers(), st.integers(0, 50))
def test_in_the_order_of_teachers_each_slot_keeps_what_it_has(drawn, step):
    batch = drawn[0].batch(step)
    ordered = batch.by_teacher()
    assert (np.diff(ordered.teachers) >= 0).all()
    assert ordered.size == batch.size

    def rows(g):
        teachers = np.repeat(g.teachers, g.size)
        return list(zip(g.slots, g.labels, teachers, g.samples, g.views, strict=True))

    assert sorted(rows(ordered)) == rows(batch)
    assert sum(count for _, count in ordered.runs()) == len(batch.slots)
    assert [t for t, _ in ordered.runs()] == np.unique(batch.teachers).tolist()
    teachers = [t for t, count in ordered.runs() for _ in range(count)]
    assert teachers == np.repeat(ordered.teachers, ordered.size).tolist()


@settings(max_examples=60, deadline=None)
@given(dealers())
def test_classes_and_teachers_come_evenly(drawn):
    deal, labels = drawn
    batches = [deal.batch(step) for step in range(25)]
    for numbers, kinds in (
        (np.concatenate([b.classes for b in batches]), np.unique(labels)),
        (np.concatenate([b.teachers for b in batches]), deal._teachers),
    ):
        counts = Counter(numbers.tolist())
        assert set(counts) <= set(kinds.tolist())
        assert max(counts.values()) - min(counts.get(int(k), 0) for k in kinds) <= 1


@settings(max_examples=60, deadline=None)
@given(dealers())
def test_each_class_shows_all_its_samples_before_any_twice(drawn):
    deal, labels = drawn
    samples = np.concatenate([deal.batch(step).samples for step in range(40)])
    for c in np.unique(labels):
        counts = Counter(samples[labels[samples] == c].tolist())
        members = np.flatnonzero(labels == c)
        if counts:
            assert max(counts.values()) - min(counts.get(int(m), 0) for m in members) <= 1


def test_every_class_meets_every_teacher():
    deal = dealer(groups=4, labels=list(range(10)) * 3, teachers=5)
    pairs = {(c, t) for s in range(200) for b in [deal.batch(s)] for c, t in zip(b.classes, b.teachers, strict=True)}
    assert len(pairs) == 50


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 1024), st.integers(0, 1000))
def test_views_lie_within_the_cache_and_all_are_used(views, step):
    batch = dealer(groups=64, group=8, views=views).batch(step)
    assert batch.views.min() >= 0
    assert batch.views.max() < views
    if views <= 8:
        assert set(batch.views) == set(range(views))


def test_a_batch_depends_on_seed_and_step_alone():
    one, two = dealer(), dealer()
    assert two.batch(7).samples.tolist() == one.batch(7).samples.tolist()  # without the steps before
    assert dealer(seed=1).batch(7).samples.tolist() != one.batch(7).samples.tolist()
    assert one.batch(8).samples.tolist() != one.batch(7).samples.tolist()


@settings(max_examples=30, deadline=None)
@given(dealers(), st.lists(st.integers(0, 50), min_size=1, max_size=12))
def test_kept_permutations_change_no_batch(drawn, steps):
    deal, _ = drawn
    plain = copy.copy(deal)
    plain._recent = permutation
    for step in steps:
        for field in dataclasses.fields(Groups):
            assert np.array_equal(getattr(deal.batch(step), field.name), getattr(plain.batch(step), field.name))


def test_a_class_is_shuffled_once_a_round_not_once_a_group(monkeypatch):
    drawn = []
    monkeypatch.setattr("gdd_dist.data.order.permutation", lambda *of: drawn.append(of) or permutation(*of))
    deal = dealer(groups=6, group=2, labels=[0] * 12 + [1] * 12)
    for step in range(2):  # of each class six groups of two: all of it, once
        deal.batch(step)
    assert sorted(of[1] for of in drawn if "sample" in of[1]) == ["matching/sample/0", "matching/sample/1"]


def test_golden_batch():
    batch = dealer().batch(3)
    assert [batch.classes.tolist(), batch.teachers.tolist(), batch.samples.tolist(), batch.views.tolist()] == GOLDEN


GOLDEN = [[1, 2, 0, 0], [1, 2, 0, 1], [13, 1, 14, 5, 9, 6, 12, 6], [1, 1, 0, 1, 1, 0, 1, 1]]
