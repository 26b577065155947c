"""Command line and files → settings: precedence, wrong use, and a file that reads back (design 3)."""

import dataclasses
import itertools
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gdd_dist.config.bounds import options
from gdd_dist.config.command_line import parse, to_yaml
from gdd_dist.config.presets import PRESETS
from gdd_dist.config.settings import SECTIONS, Config
from gdd_dist.config.steps import STEPS
from sharding.errors import UserError


def fault(*argv):
    with pytest.raises(UserError) as e:
        parse(argv)
    return str(e.value)


def test_without_arguments_the_digits_in_runs_digits():
    command = parse([])
    assert command.preset == "digits"
    assert command.config.out == "runs/digits"
    assert command.config.data is None
    assert not command.config.loader.flip
    assert not command.print_config
    assert not command.dry_run


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_hold_settings_that_exist_and_are_within_bounds(preset):
    config = parse(["--preset", preset]).config
    assert config.out == f"runs/{preset}"
    for name, value in PRESETS[preset].items():
        section, _, leaf = name.rpartition(".")
        found = getattr(getattr(config, section) if section else config, leaf)
        assert found == (tuple(value) if isinstance(value, list) else value)


def test_command_line_over_file_over_preset_over_defaults_in_any_order(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("matching: {temperature: 3.0, lr: 0.5}\nreport: {epochs: 7}\n")
    parts = (["--preset", "digits"], ["--config", str(file)], ["--matching.temperature", "4"])
    for order in itertools.permutations(parts):
        config = parse([token for part in order for token in part]).config
        assert config.matching.temperature == 4.0  # command line over file
        assert config.matching.lr == 0.5  # file over default
        assert config.report.epochs == 7  # file over preset
        assert config.gan.steps == PRESETS["digits"]["gan.steps"]  # preset over default
        assert config.logits.batch == Config().logits.batch


def test_a_file_may_name_the_preset_and_the_command_line_another(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("preset: cifar10\nseed: 3\n")
    assert parse(["--config", str(file)]).preset == "cifar10"
    command = parse(["--config", str(file), "--preset", "digits"])
    assert command.preset == "digits"
    assert command.config.seed == 3


def test_every_section_has_its_settings_and_no_name_is_there_twice():
    names = [name for name, _, _ in options()]
    assert len(names) == len(set(names))
    fields = {f"{s}.{f.name}" for s in SECTIONS for f in dataclasses.fields(getattr(Config(), s))}
    assert {n for n in names if "." in n} == fields
    assert {n.partition(".")[0] for n in names if "." in n} == set(SECTIONS)
    assert "data" not in SECTIONS
    fixed = "seed precision teachers.epochs gan.steps gan.batch matching.steps matching.batch report.ipc report.seeds"
    assert {*fixed.split(), "report.students", *(f"{s}.seed" for s in STEPS[1:])} <= set(names)


def values(name, hint, field):
    """Some values that a setting may take, as they are typed."""
    meta = field.metadata
    if "augment" in name and not name.endswith("_p"):
        return st.sampled_from(["none", "color", "crop_cutout"])
    if "architectures" in name or name.endswith(("students", "student")) and "quick_students" not in name:
        return st.lists(st.sampled_from(["convnet", "resnet10:16"]), min_size=1, max_size=2)
    if meta["choices"]:
        return st.sampled_from(meta["choices"])
    low = meta["low"] if meta["low"] is not None else meta["above"] if meta["above"] is not None else 0
    high = meta["high"] if meta["high"] is not None else low + 50
    if hint is bool:
        return st.sampled_from(["true", "false"])
    if "int" in str(hint):
        return st.integers(int(low), int(high))
    if "float" in str(hint):
        return st.floats(low, high, exclude_min=meta["above"] is not None, width=32)
    return st.sampled_from(["a", "some/where", "null.yaml"])


@st.composite
def command_lines(draw):
    argv = ["--preset", draw(st.sampled_from(list(PRESETS)))]
    chosen = draw(st.lists(st.sampled_from(list(options())), max_size=6, unique_by=lambda o: o[0]))
    for name, hint, field in chosen:
        if name in ("data", "matching.batch", "matching.group"):
            continue
        value = draw(values(name, hint, field))
        value = value if isinstance(value, list) else [value]
        if not str(hint).startswith("tuple"):
            value = value[:1]
        argv += [f"--{name}", *map(str, value)]
    return argv


@settings(max_examples=15, deadline=None)
@given(command_lines())
def test_what_print_config_prints_reads_back_as_the_same_settings(tmp_path_factory, argv):
    try:
        command = parse(argv)
    except UserError:  # two settings that exclude each other
        return
    file = tmp_path_factory.mktemp("config") / "printed.yaml"
    file.write_text(to_yaml(command.config, command.preset))
    again = parse(["--config", str(file)])
    assert again.config == command.config
    assert again.preset == command.preset


def test_several_values_and_one():
    assert parse(["--report.ipc", "1", "10", "--seed", "1"]).config.report.ipc == (1, 10)
    assert parse(["--report.ipc", "5"]).config.report.ipc == (5,)
    assert parse(["--report.ipc=5"]).config.report.ipc == (5,)


def test_a_file_may_write_numbers_as_people_do(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("gan: {lr: 1e-3, steps: 12}\nloader: {flip: no}\nmatching: {seed: null}\n")
    config = parse(["--config", str(file)]).config
    assert (config.gan.lr, config.gan.steps, config.loader.flip, config.matching.seed) == (1e-3, 12, False, None)


@pytest.mark.parametrize("text", ["5e-4", "2024_01", "1e5", "010", "12:30", "yes", "on", "1_0", "2024-11-28", "'null'"])
def test_a_path_in_a_file_is_the_text_that_stands_there(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(f"out: {text}\n")
    command = parse(["--config", "c.yaml"])
    assert command.config.out == ("runs/digits" if text == "'null'" else text)
    (tmp_path / "again.yaml").write_text(to_yaml(command.config, command.preset))
    assert parse(["--config", "again.yaml"]).config == command.config


@pytest.mark.parametrize("value", ["017", "1:30", "0x1f", "0b1", "0o7", "-01"])
@pytest.mark.parametrize("name", ["seed", "gan.steps", "report.ipc", "matching.seed"])
def test_an_integer_is_decimal(tmp_path, name, value):
    said = f"--{name} {value} is not a decimal number"
    assert said in fault(f"--{name}={value}")
    (tmp_path / "c.yaml").write_text(f"{name}: {value}\n")
    assert said in fault("--config", str(tmp_path / "c.yaml"))


def test_a_run_directory_whose_name_is_not_utf8_is_refused():
    message = fault("--out", os.fsdecode(b"caf\xe9"))
    assert r"--out caf\xe9 is not UTF-8" in message
    message.encode()  # it can be printed


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gan:\n  lr: 0.1\nmatching: {lr: 1}\ngan:\n  steps: 7\n", "gan in {} is given twice, in lines 1 and 4; "),
        ("gan:\n  lr: 0.1\n  lr: 0.2\n", "gan.lr in {} is given twice, in lines 2 and 3; "),
        ("gan: {lr: 0.1}\ngan.lr: 0.2\n", "gan.lr in {} is given twice, in lines 1 and 2; "),
        ("seed: 1\nseed: 1\n", "seed in {} is given twice, in lines 1 and 2; "),
        ("gan: 3\n", "gan in {} is a section; "),
    ],
)
def test_what_a_file_says_twice_is_refused_with_both_lines(tmp_path, text, says):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert says.format(file) in fault("--config", str(file))


def test_an_empty_section_is_empty_and_a_byte_order_mark_is_none_of_the_text(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_bytes(b"\xef\xbb\xbfgan:\n#  lr: 0.1\nmatching: {lr: 3e-1}\n")
    assert parse(["--config", str(file)]).config == parse(["--matching.lr", "0.3"]).config


def test_a_home_directory_is_meant_behind_an_equals_sign_too(tmp_path, monkeypatch, digits):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "d").symlink_to(digits)
    (tmp_path / "c.yaml").write_text("store: ~/s\n")
    argv = ["--out=~/r", "--data=~/d", "--loader.cache_dir=~/k", "--deepspeed_config=~/z.json", "--config=~/c.yaml"]
    c = parse(argv).config
    found = (c.out, c.data, c.loader.cache_dir, c.deepspeed_config, c.store)
    assert found == tuple(str(tmp_path / name) for name in ("r", "d", "k", "z.json", "s"))


def test_relative_paths_are_kept_as_absolute_ones_so_that_they_mean_the_same_elsewhere(tmp_path, monkeypatch, digits):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").symlink_to(digits)
    file = tmp_path / "kept.yaml"
    file.write_text(to_yaml(parse(["--data", "d", "--store", "s"]).config, "digits"))
    monkeypatch.chdir("/")
    config = parse(["--config", str(file)]).config
    assert (config.data, config.store) == (str(tmp_path / "d"), str(tmp_path / "s"))


def test_one_value_in_a_file_stands_for_a_list_of_one(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("report: {ipc: 5, students: convnet}\n")
    report = parse(["--config", str(file)]).config.report
    assert (report.ipc, report.students) == ((5,), ("convnet",))


def test_dashes_flags_and_what_launchers_add():
    command = parse(["--local_rank=3", "--debug", "--no-verify", "--deepspeed-config", "a.json", "--dry-run"])
    assert command.config.debug
    assert not command.config.verify
    assert command.config.deepspeed_config == str(Path("a.json").absolute())
    assert command.dry_run
    assert parse(["--print-config"]).print_config
    assert parse(["--print_config"]).print_config
    assert parse(["--local-rank", "3"]).config == parse([]).config
    assert parse(["--debug", "--seed", "2"]).config.seed == 2


def test_seeds_of_steps_follow_the_seed_unless_given():
    config = parse(["--seed", "5", "--gan.seed", "9"]).config
    assert [config.step_seed(s) for s in STEPS[1:]] == [5, 5, 5, 9, 5, 5]


def test_what_says_only_where_or_how_fast_shapes_nothing():
    one = parse([]).config
    other = parse(["--loader.threads", "3", "--loader.prefetch", "5", "--loader.resident", "ram"]).config
    assert one.shaping("loader") == other.shaping("loader")
    assert one.shaping("loader") != parse(["--loader.window", "5"]).config.shaping("loader")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--matching.temprature", "--matching.temperature"),
        ("--temperature", "--matching.temperature"),
        ("--gan.step", "--gan.steps"),
        ("--matching.lambda-pair2", "--matching.lambda_pair"),
        ("--outt", "--out"),
    ],
)
def test_an_unknown_setting_is_answered_with_the_nearest_name(typed, meant):
    assert f"did you mean {meant}?" in fault(typed, "3")
    assert f"did you mean {meant}?" in fault(f"{typed}=3")


def test_an_unknown_setting_in_a_file_names_file_and_nearest(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("matching: {temprature: 3}\n")
    message = fault("--config", str(file))
    assert str(file) in message
    assert "did you mean --matching.temperature?" in message


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--preset", "cifar"], "unknown preset cifar; did you mean cifar10?"),
        (["--preset", "xyz"], "unknown preset xyz; there are"),
        (["--matching.temperature", "-1"], "--matching.temperature -1.0"),
        (["--matching.temperature", "0"], "give more than 0"),
        (["--matching.temperature", "nan"], "--matching.temperature"),
        (["--matching.temperature", "inf"], "--matching.temperature"),
        (["--matching.temperature", "warm"], "matching.temperature"),
        (["--gan.lr", "1e400"], "--gan.lr inf is not a finite number"),
        (["--gan.lr", "1e38"], "--gan.lr 1e+38 is too large"),
        (["--gan.beta1", "1"], "give less than 1"),
        (["--gan.beta2", "1"], "give less than 1"),
        (["--gan.steps", "9999999999"], "--gan.steps 9999999999 is too large"),
        (["--seed", "99999999999999999999"], "--seed 99999999999999999999 is too large"),
        (["--timeout", "1e20"], "--timeout 1e+20 is too large"),
        (["--gan.steps", "1.5"], "gan.steps"),
        (["--report.seeds", "2147483647"], "--report.seeds 2147483647 is too large; give at most 10000"),
        (["--teachers.snapshots", "2147483647"], "give at most 10000"),
        (["--report.condense", "9", "--report.ipc", "1", "5000"], "moves all images of a class together"),
        (["--config="], "--config is empty"),
        (["--config", ""], "--config is empty"),
        (["--data="], "--data is empty"),
        (["--matching.lambda_pair=0", "--matching.lambda_mean=0", "--matching.lambda_adv=0"], "it trains nothing"),
        (["--gan.steps", "0"], "--gan.steps 0"),
        (["--gan.beta1", "1.5"], "--gan.beta1 1.5"),
        (["--seed", "-1"], "--seed -1"),
        (["--until", "gann"], "--until gann"),
        (["--precision", "fp8"], "--precision fp8"),
        (["--engine", "horovod"], "--engine horovod"),
        (["--report.protocol", "once"], "once"),
        (["--loader.augment", "blur"], "--loader.augment blur"),
        (["--matching.batch", "10", "--matching.group", "4"], "not a multiple"),
        (["--data", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--gan.steps"], "gan.steps"),
        (["--report.ipc"], "report.ipc"),
        (["--config"], "config"),
        (["stray"], "stray"),
        (["--report.ipc", "1", "ten"], "--report.ipc element 2: Expected an integer. Got value: ten"),
        (["--gan.seed", "x"], "--gan.seed: Expected an integer or null. Got value: x"),
        (["--channels_last", "maybe"], "--channels_last: Expected true or false or null. Got value: maybe"),
    ],
)
def test_wrong_use_is_one_line_that_says_what(argv, says):
    message = fault(*argv)
    assert says in message
    assert ";" in message
    assert "\n" not in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    "text",
    [
        "matching: {temperature: warm}",
        "matching: {temperature: [1, 2]}",
        "matching: 3",
        "gan: {steps: null}",
        "- a\n- b",
        "a: [",
        "",
        "preset: nothing",
        "preset: 3",
        "data: 7",
        "out: [1]",
        "1: 2",
        "report: {ipc: []}",
        "report: {ipc: [1, x]}",
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    message = fault("--config", str(file))
    assert "\n" not in message
    assert ";" in message


def test_a_file_of_an_earlier_version_may_hold_a_setting_that_is_gone(tmp_path):
    (tmp_path / "c.yaml").write_text("matching: {refit: 3, steps: 7}")
    assert parse(["--config", str(tmp_path / "c.yaml")]).config.matching.steps == 7
    assert "unknown setting matching.refit" in fault("--matching.refit", "3")


def test_a_file_of_other_bytes_is_named(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    assert str(file) in fault("--config", str(file))


def test_help_names_every_setting_and_leaves_with_0(capsys):
    with pytest.raises(SystemExit) as e:
        parse(["--help"])
    assert not e.value.code
    text = capsys.readouterr().out
    for name, _, _ in options():
        assert f"--{name}" in text


def test_yaml_holds_every_setting():
    tree = yaml.safe_load(to_yaml(parse([]).config, "digits"))
    assert tree.pop("preset") == "digits"
    assert set(tree) == {f.name for f in dataclasses.fields(Config)}


def test_the_preset_follows_the_data(digits, tmp_path):
    assert parse(["--data", str(digits)]).preset == "digits"
    manifest = (digits / "manifest.json").read_text()
    for name, size, preset in (("mine", 16, "digits"), ("mine", 32, "cifar10"), ("mine", 64, "tiny-imagenet")):
        changed = manifest.replace('"name": "digits"', f'"name": "{name}"', 1)
        changed = changed.replace('"height": 16', f'"height": {size}').replace('"width": 16', f'"width": {size}')
        (tmp_path / "manifest.json").write_text(changed)
        assert parse(["--data", str(tmp_path)]).preset == preset
        assert parse(["--data", str(tmp_path), "--preset", "cifar100"]).preset == "cifar100"


def test_data_named_in_a_file_picks_the_preset(digits, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(f"data: {digits}\n")
    command = parse(["--config", str(file)])
    assert (command.preset, command.config.data) == ("digits", str(digits))
    assert Path(command.config.out) == Path("runs/digits")
