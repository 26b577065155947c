"""Whatever a setting is given is accepted or refused in one line, before anything is allocated: drawn from the settings' own bounds."""

import json
import math
from functools import cache

import pytest
import ranks
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gdd_dist.config.bounds import options
from gdd_dist.config.command_line import parse
from gdd_dist.pipeline.preflight import check
from sharding.errors import UserError
from sharding.manifest import Manifest

OPTIONS = [o for o in options() if o[0] not in ("data", "out", "store", "debug")]
EXTREME = [0, 1, 2, 3, 64, 65_537, 2**31 - 1, 2**31, 2**63, 10**30, -1]
REAL = [0.0, 1e-320, 1e-30, 1e-3, 0.5, 1.0, 1e30, 1e38, 1e308, math.inf, -math.inf, math.nan, -1.0]
WORDS = [
    "",
    "none",
    "convnet",
    "convnet:8",
    "convnet:65537",
    "resnet18_bn",
    "alexnet:0",
    "50GB",
    "1e400B",
    "\udce9",
    "~",
    "a b",
    "0",
]


def typed(name, hint, field):
    """Values of a setting as they are typed: those it names, those at its bounds, and any of its kind."""
    meta = field.metadata
    bounds = [meta[k] for k in ("low", "above", "high", "below") if meta[k] is not None]
    if "int" in str(hint):
        near = [int(b) + d for b in bounds for d in (-1, 0, 1)]
        return st.one_of(st.sampled_from([*EXTREME, *near]), st.integers()).map(str)
    if "float" in str(hint):
        near = [math.nextafter(b, b + d) for b in bounds for d in (-1, 0, 1)]
        return st.one_of(st.sampled_from([*REAL, *near]), st.floats()).map(repr)
    words = [*(meta["choices"] or ()), *WORDS]
    return st.one_of(st.sampled_from(words), st.text(max_size=8)).filter(lambda v: not v.startswith("-"))


@st.composite
def command_lines(draw, most=3):
    argv = []
    for name, hint, field in draw(
        st.lists(st.sampled_from(OPTIONS), min_size=1, max_size=most, unique_by=lambda o: o[0])
    ):
        several = str(hint).startswith("tuple")
        values = draw(st.lists(typed(name, hint, field), min_size=1, max_size=2 if several else 1))
        argv += [f"--{name}", *values] if several else [f"--{name}={values[0]}"]
    return argv


@cache
def manifest(path):
    return Manifest.load(path)


def refusal(data, argv, world=1):
    """The line that refuses a command line, "" where it is accepted; networks are counted, none is made."""
    try:
        check(parse(["--preset", "digits", *argv]).config, manifest(data), world, torch.device("cpu"))
    except UserError as e:
        return str(e)
    return ""


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(argv=command_lines())
@example(argv=["--gan.width=2147483647"])
@example(argv=["--gan.batch=2147483646", "--gan.latent=2147483647"])
def test_any_value_is_accepted_or_refused_in_one_line(digits, argv):
    line = refusal(digits, argv)
    assert "\n" not in line
    assert not line or ";" in line
    json.dumps(line)


@pytest.mark.parametrize(
    "argv",
    [
        "--gan.width 1000000",
        "--gan.d_width 1000000",
        "--gan.latent 2000000000",
        "--teachers.architectures resnet18:60000",
        "--report.students alexnet:60000",
        "--matching.quick_student convnet:60000",
        "--gan.batch 1073741824",
        "--report.ipc 1000000000",
        "--report.ipc 1 1000000000",
    ],
)
def test_what_no_memory_holds_is_refused_by_the_name_of_its_setting(digits, argv):
    line = refusal(digits, argv.split())
    assert argv.split()[0] in line
    assert ("needs at least" in line and "GB of memory" in line) or "--report.ipc" in argv


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(argv=command_lines(most=2))
def test_a_dry_run_ends_with_its_table_or_one_line(digits, tmp_path_factory, argv):
    folder = tmp_path_factory.mktemp("dry")
    ended = ranks.start(folder / "out", ["--data", str(digits), "--preset", "digits", *argv, "--dry-run"]).wait()
    assert ended.codes[0] in (0, 2), ended.text
    assert len(ended.errors) == (ended.codes[0] == 2), ended.text
    assert "Traceback" not in ended.text
    assert "unforeseen" not in ended.text
