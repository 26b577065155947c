"""The space is data, its draws a function of seed, number and what has ended; what the trainer would refuse is refused before."""

import dataclasses

import pytest
import yaml

from gdd_dist.config.settings import Config
from sharding.errors import UserError
from tune import space
from tune.proposals import Proposals
from tune.space import SPACE, Axis


def drawn(algorithm="random", seed=0, count=20, axes=SPACE):
    proposals = Proposals(axes, algorithm, Config(seed=seed))
    return [proposals.propose(f"{n:03d}") for n in range(count)]


def test_the_space_fits_the_trainer():
    space.check(SPACE, Config())
    names = [axis.setting for axis in SPACE]
    assert names[0] == "matching.temperature"
    assert {"matching.lambda_pair", "matching.lambda_mean", "matching.lambda_adv", "matching.lr"} <= set(names)
    temperature = SPACE[0]
    assert (temperature.low, temperature.high, temperature.log) == (0.5, 8.0, True)
    assert all(axis.why for axis in SPACE)


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_draws_lie_within_the_space_and_weights_may_be_exactly_0(algorithm):
    axes = {axis.setting: axis for axis in SPACE}
    for settings in drawn(algorithm, count=60):
        assert settings.keys() == axes.keys()
        assert space.trainable(Config(), settings)
        for name, value in settings.items():
            axis = axes[name]
            assert value in axis.choices or value == 0 or axis.low <= value <= axis.high
            assert value != 0 or axis.zero or 0 in axis.choices
            assert type(value) is axis.type
    zeros = [s["matching.lambda_mean"] == 0 for s in drawn(count=200)]
    assert 0.1 < sum(zeros) / len(zeros) < 0.3


def test_a_draw_depends_on_seed_and_number_alone():
    assert drawn(count=5) == drawn(count=5)
    late = Proposals(SPACE, "random", Config())
    assert late.propose("004") == drawn(count=5)[4]
    assert drawn(seed=1, count=5) != drawn(count=5)


def test_a_sampler_that_forgot_everything_goes_on_from_the_record():
    """TPE: what is drawn next is the same whether the trials before were seen to end or were read from the record."""
    whole = Proposals(SPACE, "optuna", Config(seed=3))
    settings = [whole.propose(f"{n:03d}") for n in range(8)]
    for n, s in enumerate(settings):
        whole.tell(f"{n:03d}", -abs(s["matching.temperature"] - 2))
    again = Proposals(SPACE, "optuna", Config(seed=3))
    for n, s in enumerate(settings):
        again.remember(f"{n:03d}", s)
        again.tell(f"{n:03d}", -abs(s["matching.temperature"] - 2))
    ours, theirs = whole.propose("008"), again.propose("008")
    assert theirs["matching.temperature"] == pytest.approx(ours["matching.temperature"], rel=0.2)


def test_tpe_learns_where_it_is_good():
    axes = (Axis("matching.temperature", 0.5, 8.0, log=True),)
    far = {"random": 0.0, "optuna": 0.0}
    for algorithm in far:
        for seed in range(3):
            proposals = Proposals(axes, algorithm, Config(seed=seed))
            for n in range(40):
                value = proposals.propose(f"{n:03d}")["matching.temperature"]
                proposals.tell(f"{n:03d}", -abs(value - 3.0))
                far[algorithm] += abs(value - 3.0) if n >= 20 else 0.0
    assert far["optuna"] < 0.7 * far["random"]


def test_trials_that_failed_and_defaults_outside_the_space_do_not_break_the_sampler():
    proposals = Proposals((Axis("matching.temperature", 0.5, 1.0),), "optuna", Config())
    proposals.remember("000", {"matching.temperature": 2.0})
    proposals.tell("000", 90.0)
    proposals.propose("001")
    proposals.tell("001", None)
    assert 0.5 <= proposals.propose("002")["matching.temperature"] <= 1.0


def test_a_trial_that_would_train_nothing_is_never_drawn():
    off = {"matching.lambda_pair": 0.0, "matching.lambda_mean": 0.0, "matching.lambda_adv": 0.0}
    assert not space.trainable(Config(), off)
    assert space.trainable(Config(), {**off, "matching.lambda_label": 0.1})
    axes = tuple(Axis(name, choices=(0.0,)) for name in off)
    with pytest.raises(UserError, match="random settings from the space can be trained"):
        Proposals(axes, "random", Config()).propose("001")


def test_a_file_changes_the_space(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(
        "matching.temperature: {low: 1, high: 4}\nmatching.views: null\nmatching.group: {choices: [4, 8]}\n"
    )
    axes = {axis.setting: axis for axis in space.load(str(path))}
    assert axes["matching.temperature"] == Axis("matching.temperature", 1, 4)
    assert "matching.views" not in axes
    assert axes["matching.group"].choices == (4, 8)
    assert len(axes) == len(SPACE)
    space.check(tuple(axes.values()), Config())


def test_what_is_printed_is_read_back(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(space.dump(SPACE))
    assert space.load(str(path)) == SPACE
    assert all(isinstance(v, dict) for v in yaml.safe_load(path.read_text()).values())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("matching.temperature: {low: 4, high: 1}", "low must be below high"),
        ("matching.temperature: {low: 0, high: 1, log: true}", "above 0 with log"),
        ("matching.temperature: {low: -1, high: 1}", "too small"),
        ("matching.temperature: {lo: 1}", "must have some of"),
        ("matching.temperature: 3", "must have some of"),
        ("matching.lr: {low: small, high: 1e-3}", "numbers"),
        ("matching.lr: {low: 1e-4, high: .inf}", "not a finite number"),
        ("matching.lr: {low: 1e-4, high: 1e-3, zero: half}", "numbers"),
        ("matching.lr: {low: 1e-4, high: 1e-3}\nmatching.lr: {low: 1e-5, high: 1e-4}", "given twice, in lines 1 and 2"),
        ("matching.loss: {low: 0, high: 1}", "needs choices"),
        ("matching.loss: {choices: [skd, foo]}", "foo is not known"),
        ("matching.views: {choices: [0.5]}", "is not a valid int"),
        ("matching.quick_steps: {choices: [1]}", "measurement"),
        ("teachers.epochs: {choices: [1, 2]}", "only matching.NAME"),
        ("matching.nonsense: {choices: [1, 2]}", "only matching.NAME"),
        ("matching.nope:", "matching.nope in .* is no setting of matching"),
        ("matching.views: {choices: [1], low: 0, high: 2}", "has choices and a range"),
        ('matching.lr: {low: 1e-4, high: 1e-3, log: "no"}', "log of matching.lr in .* is no; give true or false"),
        ("- a list", "holds no settings"),
        ("{", "is not YAML"),
    ],
)
def test_a_wrong_space_is_one_clear_error(tmp_path, text, words):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        space.check(space.load(str(path)), Config())


def test_settings_are_applied_to_matching_alone():
    config = space.apply(Config(), {"matching.temperature": 3.0, "matching.teachers": "last"})
    assert (config.matching.temperature, config.matching.teachers) == (3.0, "last")
    assert dataclasses.replace(config, matching=Config().matching) == Config()
