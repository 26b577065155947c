"""The numbers of each step stay as recorded until its VERSION is raised, and the records notice when a formula changes."""

import shutil
import sys

import golden_numbers as golden
import pytest
import yaml

from gdd_dist.config.presets import PRESETS
from sharding.errors import UserError

STEPS = tuple(golden.BEFORE)
TARGETS = {
    "kd": "gdd_dist.training.losses.kd",
    "mean_logit": "gdd_dist.training.losses.mean_logit",
    "mean_feature": "gdd_dist.training.losses.mean_feature",
    "augment": "gdd_dist.data.augment.augment",
    "train_discriminator": "gdd_dist.training.adversaries.Adversaries.train_discriminator",
    "update_ema": "gdd_dist.training.adversaries.Adversaries.update_ema",
}
"""What the mutations replace: the place of its definition."""


# mutations: what stands in the code → what stands there by mistake


def flipped_sign(kd):
    return lambda real, fake, temperature: -kd(real, fake, temperature)


def flipped_gradient(kd):
    """The value stays, so that only what follows from it can show."""

    def mutant(real, fake, temperature):
        value = kd(real, fake, temperature)
        return 2 * value.detach() - value

    return mutant


def swapped_sides(kd):
    return lambda real, fake, temperature: kd(fake, real, temperature)


def biased_mean(_mean_logit):
    return lambda class_mean, fake: (class_mean - fake.mean(1)).square().sum(-1).mean()


def flipped_feature(mean_feature):
    return lambda *given: -mean_feature(*given)


def no_ema(_update_ema):
    return lambda self, decay: None


def ema_without_memory(update_ema):
    return lambda self, decay: update_ema(self, 0.0)


def color_last(augment):
    def mutant(images, draws, *, flip, fill, ops="color_crop_cutout"):
        names = [name for name in ops.split("_") if name != "color"]
        moved = augment(images, draws, flip=flip, fill=fill, ops="_".join(names))
        return augment(moved, draws, flip=False, fill=fill, ops="color") if "color" in ops else moved

    return mutant


def plain_for_discriminator(train_discriminator):
    def mutant(self, real, fake, labels, gamma, augment, lr):
        return train_discriminator(self, real, fake, labels, gamma, lambda images: images, lr)

    return mutant


MUTATIONS = [
    ("kd", flipped_sign, ["matching"]),
    ("kd", flipped_gradient, ["matching"]),
    ("kd", swapped_sides, ["matching"]),
    ("mean_logit", biased_mean, ["matching", "moved"]),
    ("mean_feature", flipped_feature, ["moved"]),
    ("update_ema", no_ema, ["gan", "matching"]),
    ("update_ema", ema_without_memory, ["matching"]),
    ("augment", color_last, [step for step in STEPS if step != "gaussian"]),
    ("train_discriminator", plain_for_discriminator, ["gan", "matching"]),
]


def put_in_place(monkeypatch, target, mutate):
    """Put the mutant where the package defines the target, and wherever it imported it by name."""
    module, _, name = TARGETS[target].rpartition(".")
    if module in sys.modules:
        found = getattr(sys.modules[module], name)
        holders = [m for k, m in sys.modules.items() if k.startswith("gdd_dist") and getattr(m, name, None) is found]
    else:  # a method
        module, _, owner = module.rpartition(".")
        holders = [getattr(sys.modules[module], owner)]
        found = getattr(holders[0], name)
    mutant = mutate(found)
    for holder in holders:
        monkeypatch.setattr(holder, name, mutant)


# the runs


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setattr("gdd_dist.runtime.world.World.threads", 1)


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """A run up to matching, and after it nothing changes there."""
    out = tmp_path_factory.mktemp("golden") / "out"
    golden.run(digits, out, "matching")
    golden.run(digits, out, golden.MOVED)
    return out


def after(whole, out, steps):
    """A run directory that holds these finished steps of another."""
    for step in steps:
        found = (whole / step / "latest").resolve()
        shutil.copytree(found, out / step / found.name)
        (out / step / "latest").symlink_to(found.name)
    return out


def worst(step, data, out):
    """The largest deviation from the record, in tolerances, and the names of all that fail."""
    found = golden.deviations(golden.read_record(step)[1], golden.numbers(step, data, out))
    return max(found.values()), sorted(name for name, value in found.items() if not value <= 1)


@pytest.mark.parametrize("step", STEPS)
def test_golden_numbers(step, digits, whole):
    assert golden.read_record(step)[0] == golden.current(step), f"run: python tests/golden_numbers.py {step}"
    assert worst(step, digits, whole)[1] == [], (
        f"raise VERSION of {step} if its numbers are to change; if all of these are new, run: python tests/golden_numbers.py {step}"
    )


def test_golden_numbers_hold_where_channels_lie_last_in_memory(digits, whole, tmp_path):
    """As they do on a GPU; the next step reads the files of such a run."""
    out = after(whole, tmp_path / "out", golden.BEFORE["gan"])
    golden.run(digits, out, "matching", "--channels_last", "true")
    assert worst("gan", digits, out)[1] == []
    assert worst("matching", digits, out)[1] == []


@pytest.mark.parametrize(
    ("target", "mutate", "step"),
    [pytest.param(t, m, step, id=f"{m.__name__}-{step}") for t, m, steps in MUTATIONS for step in steps],
)
def test_golden_numbers_notice_a_wrong_formula(target, mutate, step, digits, whole, tmp_path, monkeypatch):
    out = after(whole, tmp_path / "out", golden.BEFORE[step])
    put_in_place(monkeypatch, target, mutate)
    if step != "students":
        golden.run(digits, out, step)
    assert worst(step, digits, out)[0] > 3  # not by chance


def test_golden_settings_leave_nothing_to_a_preset():
    given = yaml.safe_load(golden.SETTINGS.read_text())
    for name in {name for preset in PRESETS.values() for name in preset}:
        section, _, leaf = name.rpartition(".")
        assert leaf in (given[section] if section else given), name


def test_golden_record_is_renewed_only_after_its_version_was_raised(tmp_path, monkeypatch):
    shutil.copytree(golden.RECORDS, tmp_path / "golden")
    monkeypatch.setattr(golden, "RECORDS", tmp_path / "golden")
    known = golden.versions()
    before = golden.record_path("gan").read_bytes()
    with pytest.raises(UserError, match=f"VERSION of gan is still {known['gan']}; raise it"):
        golden.renew(["gan"])
    assert golden.record_path("gan").read_bytes() == before
    monkeypatch.setattr(golden, "versions", lambda: {**known, "gan": 99})
    assert [step for step in STEPS if golden.due(step)] == ["gan", "matching", "students", "moved"]
    golden.renew(["gan"])
    assert golden.read_record("gan")[0] == {"gan": 99}
    assert [step for step in STEPS if golden.due(step)] == ["matching", "students", "moved"]


@pytest.mark.parametrize(
    ("step", "said"), [("gan", "VERSION of gan is still"), ("gans", "unknown step gans; there are")]
)
def test_golden_command_refuses_with_one_line(step, said, capsys):
    assert golden.main([step]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {said}")


def test_golden_record_takes_a_new_curve_without_a_raised_version(tmp_path, monkeypatch):
    shutil.copytree(golden.RECORDS, tmp_path / "golden")
    monkeypatch.setattr(golden, "RECORDS", tmp_path / "golden")
    before, inner = golden.read_record("gan"), golden.numbers

    def with_a_curve(*given):
        found = inner(*given)
        return {**found, "losses": {"gan/another": [1.0, 2.0], **found["losses"]}}

    monkeypatch.setattr(golden, "numbers", with_a_curve)
    golden.renew(["gan"])
    versions, values = golden.read_record("gan")
    assert versions == before[0]
    assert values["losses"].pop("gan/another") == [1.0, 2.0]
    assert values == before[1]  # the numbers that were recorded, not those of this run


@pytest.mark.parametrize("known", [{"a": [1.1]}, {"a": [1.0], "gone": [1.0]}, {"a": [1.0, 2.0]}])
def test_golden_record_takes_nothing_new_while_a_recorded_number_is_changed_or_missing(known):
    recorded, found = {"losses": known}, {"losses": {"a": [1.0], "new": [3.0]}}
    assert golden.completed({"losses": {"a": [1.0]}}, found) == found
    assert golden.completed(recorded, found) == {}


def test_golden_deviations_say_which_names_are_new_or_missing():
    found = golden.deviations({"losses": {"a": [1.0], "gone": []}}, {"losses": {"a": [1.0], "new": []}})
    assert found == {
        "losses/a": 0.0,
        "losses/gone (missing: only in the record)": float("inf"),
        "losses/new (new: not in the record)": float("inf"),
    }
