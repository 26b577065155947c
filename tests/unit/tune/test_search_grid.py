"""A study: a grid's trials, which share all before matching, and its table against numbers that others compute."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel

pytest.importorskip("ray")
from gdd_dist.config.settings import Config, Gan
from gdd_dist.config.steps import fingerprints
from sharding.errors import UserError
from sharding.manifest import Manifest
from tune import board, options, page, space, study
from tune.record import FINISHED, Outcome, Record, best_of
from tune.space import Axis

DOCS = Path(__file__).parents[3] / "docs"
SPACE = """
matching.loss: {choices: [kd, skd]}
matching.lambda_pair: {choices: [0, 1]}
matching.views: null
"""
VALS = {
    ("skd", 1.0): {4: 60.0, 5: 62.0, 6: 61.0},
    ("kd", 0.0): {4: 61.5, 5: 62.5, 6: 63.0},
    ("kd", 1.0): {4: 55.0, 5: 59.0, 6: 54.0},
    ("skd", 0.0): {4: 60.0, 5: 62.0, 6: 61.0},
}
"""(loss, lambda_pair) → seed of matching → what the trial reached."""


def a_search(tmp_path, *argv, text=SPACE):
    (tmp_path / "space.yaml").write_text(text)
    given = ["--algorithm", "grid", "--space", str(tmp_path / "space.yaml"), "--matching.seed", "4", *argv]
    return options.parse(["--out", str(tmp_path), *given])


@pytest.fixture
def studied(tmp_path):
    """A study of three seeds that has ended; one trial of (kd, 1.0) diverged."""
    search, record = a_search(tmp_path), Record(tmp_path)
    for n, settings in enumerate(space.grid(search.axes, search.config, 3)):
        record.propose(f"{n:03d}", settings)
        found = {**space.values(search.columns, search.config), **settings}
        val = VALS[found["matching.loss"], found["matching.lambda_pair"]][found["matching.seed"]]
        fine = n != 10
        measured = {"val": val, "stderr": 0.5, "gap": 1.0} if fine else {}
        record.finish(Outcome(f"{n:03d}", FINISHED if fine else "diverged", settings, **measured))
    return search, record


def test_a_grid_is_each_combination_with_each_seed_and_the_defaults_once(tmp_path):
    search = a_search(tmp_path, "--seeds", "2")
    found = space.grid(search.axes, search.config, 2)
    others = [("kd", 0.0), ("kd", 1.0), ("skd", 0.0)]
    of_first = [{"matching.loss": loss, "matching.lambda_pair": weight} for loss, weight in others]
    assert found == [{}, *of_first, {"matching.seed": 5}, *({**s, "matching.seed": 5} for s in of_first)]
    assert {type(s["matching.lambda_pair"]) for s in of_first} == {
        float
    }  # as the trainer has it, whatever the file has
    o = search.options
    assert (o.trials, o.seeds, o.scheduler, o.final_seeds) == (8, 2, "fifo", 0)
    assert [axis.setting for axis in search.axes] == ["matching.loss", "matching.lambda_pair"]  # of the file alone
    assert search.columns[-1] == Axis("matching.seed", choices=(4, 5))


def test_defaults_outside_the_choices_stand_beside_the_grid(tmp_path):
    search = a_search(tmp_path, text="matching.loss: {choices: [kd, dim, kd]}")
    assert space.grid(search.axes, search.config, 1) == [{}, {"matching.loss": "kd"}, {"matching.loss": "dim"}]
    outcomes = [
        Outcome(f"{n:03d}", FINISHED, s, 50.0 + n, 1.0) for n, s in enumerate(space.grid(search.axes, search.config, 1))
    ]
    marks = [t.get_text() for t in page.figure(search, outcomes, outcomes[0]).axes[0].get_xticklabels()]
    assert marks == ["kd", "dim", "skd"]


def test_what_trains_nothing_is_left_out_and_said(tmp_path):
    off = "".join(f"matching.lambda_{name}: {{choices: [0.1, 0]}}\n" for name in ("pair", "mean", "adv"))
    search = a_search(tmp_path, text=off)
    assert search.options.trials == 3 * 8  # the defaults are none of the eight, one of which has no term
    assert "Left out, because they cannot be trained: matching.lambda_pair 0, matching.lambda_mean 0," in study.note(
        search
    )


def test_any_setting_that_does_not_measure_can_be_studied(tmp_path):
    tried = {
        "loss": "[skd, kd, dim]",
        "teachers": "[all, last]",
        "lr": "[1e-4, 3e-4]",
        "group": "[4, 8]",
    }
    for leaf, choices in tried.items():
        assert a_search(tmp_path, text=f"matching.{leaf}: {{choices: {choices}}}").options.trials > 3
    for text, words in (
        ("matching.lr: {low: 1e-4, high: 1e-3}", "a grid needs choices, and matching.lr has none"),
        ("matching.quick_steps: {choices: [100, 200]}", "changes the measurement"),
        ("matching.loss: null", "leaves nothing to search"),
        ("matching.loss: {choices: [skd, mse]}", "mse is not known"),
    ):
        with pytest.raises(UserError, match=words) as e:
            a_search(tmp_path, text=text)
        assert "\n" not in str(e.value)


def test_the_example_in_the_docs_is_the_file_it_names(tmp_path):
    text = (DOCS / "examples" / "ablations.yaml").read_text()
    assert a_search(tmp_path, text=text).options.trials == 3 * 12
    shown = (DOCS / "search.md").read_text()
    assert all(line in shown for line in text.splitlines()[1:])


def test_seeds_may_be_added_and_nothing_else_of_a_study_changed(tmp_path):
    options.save(a_search(tmp_path, "--seeds", "2"))
    resume = ["--out", str(tmp_path), "--resume"]
    again = options.parse(resume)
    assert (again.options.trials, again.config.matching.seed) == (8, 4)
    more = options.parse([*resume, "--seeds", "3", "--space", str(tmp_path / "space.yaml")])
    assert more.options.trials == 12
    assert space.grid(more.axes, more.config, 3)[:8] == space.grid(again.axes, again.config, 2)
    for typed in (["--trials", "20"], ["--scheduler", "asha"], ["--algorithm", "random"]):
        with pytest.raises(UserError):
            options.parse([*resume, *typed])


@pytest.mark.parametrize("start", ["noise", "gaussian"])
def test_the_seed_of_matching_shapes_matching_alone(digits, start):
    """Else a study with several seeds would train a GAN for each."""
    config, manifest = Config(gan=Gan(start=start)), Manifest.load(digits)
    one, two = (fingerprints(space.apply(config, {space.SEED: s}), manifest, "float32") for s in (0, 1))
    assert one == fingerprints(config, manifest, "float32")
    assert [step for step in one if one[step] != two[step]] == ["matching", "report"]


def test_the_table_is_that_of_the_paired_t_test(studied):
    search, record = studied
    header, lines = study.table(search, record)
    assert header == ["loss", "lambda_pair", "seeds", "val %", "against defaults, points", "t", "p"]
    plain = np.array(list(VALS["skd", 1.0].values()))
    assert lines[0] == ["skd (defaults)", "1", "3", f"61.00 ± {plain.std(ddof=1) / 3**0.5:.2f}", "–", "–", "–"]
    ours = np.array(list(VALS["kd", 0.0].values()))
    d, wanted = ours - plain, ttest_rel(ours, plain)
    error = d.std(ddof=1) / 3**0.5
    assert lines[1] == [
        "kd *", "0", "3", f"{ours.mean():.2f} ± {ours.std(ddof=1) / 3**0.5:.2f}",
        f"{d.mean():+.2f} ± {error:.2f}", f"{wanted.statistic:.2f}", f"{wanted.pvalue:.2g}",
    ]  # fmt: skip
    assert lines[2] == ["skd", "0", "3", "61.00 ± 0.58", "+0.00 ± 0.00", "–", "–"]  # no noise, no test


def test_a_trial_that_failed_costs_its_own_pair_alone(studied):
    _, lines = study.table(*studied)
    name, weight, seeds, _, _, t, p = lines[3]
    wanted = ttest_rel([55.0, 59.0], [60.0, 62.0])
    assert (name, weight, seeds) == ("kd", "1", "2")
    assert (t, p) == (f"{wanted.statistic:.2f}", f"{wanted.pvalue:.2g}")


def test_best_is_the_best_mean_not_the_best_trial(studied):
    search, record = studied
    record.finish(dataclasses.replace(record.outcomes()["006"], val=99.0))
    assert best_of(record, "val").id == "006"  # (kd, 1.0) with seed 5; two seeds of three
    assert study.best(search, record).id == "001"
    assert study.said(search, record).startswith(
        "Best on val of 3 combinations is loss kd, lambda_pair 0: 62.33 ± 0.44 % over 3 seeds, +1.33"
    )


def test_with_one_seed_there_is_no_test_and_the_page_says_so(tmp_path):
    search, record = a_search(tmp_path, "--seeds", "1"), Record(tmp_path)
    for n, settings in enumerate(space.grid(search.axes, search.config, 1)):
        record.finish(Outcome(f"{n:03d}", FINISHED, settings, 60.0 - n, 0.5))
    _, lines = study.table(search, record)
    assert [line[3:] for line in lines] == [
        ["60.00", "–", "–", "–"],
        *([f"{60 - n}.00", f"-{n}.00", "–", "–"] for n in (1, 2, 3)),
    ]
    assert "With one seed there is no test" in study.note(search)
    assert study.said(search, record).startswith(
        "No combination was better on val than the defaults: 60.00 % over 1 seed."
    )


def test_tensorboard_takes_choices_of_any_kind_and_seeds(studied):
    search, record = studied
    mixed = a_search(record.out, text="matching.lambda_mean: {choices: [0.1, 0]}\nmatching.loss: {choices: [kd, skd]}")
    board.Writer(record, mixed.columns, search.config).setup()
    assert len(list((record.out / "tensorboard").glob("0*"))) == 11


def test_the_page_shows_combinations_before_trials(studied, capsys):
    search, record = studied
    best = study.best(search, record)
    page.write(search, record, best, None)
    text = (search.out / "search.md").read_text()
    assert text.index("## Combinations") < text.index("| skd (defaults) | 1 | 3 |") < text.index("## Trials")
    assert re.search(r"\| 005 \| finished \| 62.50 \|.*\| kd \| 0 \| 5 \|", text)
    assert "`--matching.select best`" in text
    assert "against defaults, points" in capsys.readouterr().out


def test_retrainings_have_seeds_that_no_trial_has(tmp_path):
    assert a_search(tmp_path, "--seeds", "3", "--final-seeds", "2").new_seeds == (7, 8)
    assert options.parse(["--out", str(tmp_path), "--seed", "4"]).new_seeds == (5, 6, 7)
