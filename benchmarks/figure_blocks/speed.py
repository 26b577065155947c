"""Figures of speed as ratios: against an earlier version, a bare DDP step, DiM, and no cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from figure_blocks.records import RESULTS, lines, only, table

BEFORE = "e9ace49"
SIZES = {"digits": "digits", "cifar10-trial": "CIFAR-10's trial"}
CLASSIFIERS = {"convnet": "ConvNet", "resnet18_bn:32": "DiM's ResNet-18", "resnet18": "our ResNet-18"}


def startup() -> str:
    """How long commands take to answer, beside torch's import and an earlier version."""
    rows = [
        [
            one["settings"]["command"],
            f"{1 / one['over']['import torch']:.2f}",
            f"{1 / one['over']['e9ace49']:.2f}",
        ]
        for one in lines("startup.jsonl")
    ]
    head = ["command", "time, as a share of `import torch`", "as a share of the same at e9ace49"]
    return table(head, rows) + "\n\nMedians of 3 rounds on two busy cores.\n"


def student_steps() -> str:
    """Steps of the report's students beside an earlier version, by CPU time."""
    rows = [[one["benchmark"].partition("/")[2], f"{one['ratio']:.2f} ×"] for one in lines("students.jsonl")]
    return (
        table(["student", "steps a CPU second, over e9ace49 (last row: over one by one)"], rows)
        + "\n\nMedians of 3 rounds on two busy cores.\n"
    )


def first_run() -> str:
    """`make train` beside an earlier version: wall time, time of each step, differences of accuracies."""
    found = only("first_run.jsonl", "first_run")
    before, now, about = found["steps"]["baseline"], found["steps"]["ours"], found["settings"]
    rows = [[step, *(f"{side[step]:.0f}" if step in side else "–" for side in (before, now))] for step in now]
    ratios = ", ".join(f"{1 / ratio:.2f}" for ratio in found["ratios"])
    apart = [(mean, error) for mean, error in found["differences"].values()]
    within = sum(abs(mean) <= 2 * error for mean, error in apart)
    mean = sum(mean for mean, _ in apart) / len(apart)
    return (
        table(["step", f"seconds at {BEFORE}", "seconds now"], rows)
        + f"\n\n`make train` with the same settings and {students_of_a_run()} students took {found['wall']:.2f} of {BEFORE}'s wall time "
        f"({ratios} in the {about['rounds']} rounds, one seed each).\nThen it started {about['baseline ranks']} ranks on two cores, now "
        f"{about['ranks']}. Shown are medians.\nOf {len(apart)} rows {within} have an accuracy within two standard errors of the earlier one "
        f"(paired by seed); the mean difference is {mean:+.2f} points.\n"
    )


def students_of_a_run() -> int:
    """How many students each side of the first run trained."""
    found = [json.loads(text) for text in (RESULTS / "first_run.jsonl").read_text().splitlines()]
    (count,) = {one["students"] for one in found if "students" in one}
    return int(count)


def steps() -> str:
    """The gan and matching steps by ranks, beside an earlier version and a bare step."""
    found = lines("steps.jsonl")
    rows = [
        [
            f"{one['benchmark'].partition('/')[2]}, {SIZES[one['settings']['size']]}",
            str(one["settings"]["ranks"]),
            f"{one['other']['baseline']:.0f}",
            f"{one['ours']:.0f}",
            f"{one['ratio']:.2f} ×",
            f"{one['bare']['ratio']:.2f}",
        ]
        for one in found
    ]
    head = ["step", "ranks", f"images/s at {BEFORE}", "images/s now", "ratio", "share of a bare DDP step"]
    about = found[0]["settings"]
    return table(head, rows) + (
        f"\n\nA batch of {about['batch']} images in all, on two cores; medians of {about['rounds']} rounds of {about['steps']} steps.\n"
    )


def discriminator() -> str:
    """The discriminator's step alone."""
    rows = [
        [
            SIZES[one["benchmark"].partition("/")[2]],
            str(one["settings"]["threads"]),
            f"{one['ratio']:.2f} ×",
        ]
        for one in lines("discriminator_step.jsonl")
    ]
    return table(["networks", "threads", f"images/s over {BEFORE}"], rows) + "\n"


def against_dim() -> str:
    """Our matching step beside DiM's."""
    rows = [
        [
            f"{CLASSIFIERS[one['settings']['classifier']]}, {one['benchmark'].partition('/')[2]}",
            f"{one['settings']['teachers']}",
            f"{one['ours']:,.0f}",
            f"{one['other']['DiM']:,.1f}",
            f"{one['ratio']:.1f} ×",
            f"{one['gflop_an_image']['ratio']:.1f} ×",
        ]
        for one in lines("matching_step.jsonl")
    ]
    head = ["classifier, preset", "teachers", "ours, images/min", "DiM's", "ratio", "DiM's FLOP over ours"]
    about = lines("matching_step.jsonl")[0]["settings"]
    return table(head, rows) + (
        f"\n\n{about['batch']} images of {about['size']} pixels a step, one thread, CPU time. DiM with {about['DiM']['iterations']} "
        f"iterations of the classifier and width {about['DiM']['width']}.\n"
    )


def cache() -> str:
    """Cached logits beside teachers that answer real images anew."""
    rows = [
        [
            f"{one['settings']['preset']}, {one['settings']['teachers']}",
            "whole" if one["benchmark"].endswith("/step") else "without generator, discriminator, reading",
            f"{one['ratio']:.2f} ×",
        ]
        for one in lines("logit_cache.jsonl")
        if not one["benchmark"].endswith("/break-even")
    ]
    ends = [
        f"preset {one['settings']['preset']}: the cache takes {one['forwards']['cache']:,} forwards, a run without it "
        f"{one['forwards']['run']:,}, so it pays after {one['runs']['by forwards']:.1f} runs by number and {one['runs']['by time']:.1f} by time."
        for one in lines("logit_cache.jsonl", "logit_cache/break-even")
    ]
    return (
        table(["preset, teachers", "matching step", "with the cache over without"], rows)
        + "\n\n"
        + "\n".join(ends)
        + "\n"
    )


def tests() -> str:
    """How long the tests of an earlier version take then and now."""
    (found,) = lines("suite_times.jsonl")
    seconds, functions = found["seconds"], found["functions"]
    return (
        f"Of {functions['before']:,} test functions at {BEFORE}, {functions['both']:,} are there by name. Then they took "
        f"{seconds['before'] / 60:.1f} minutes, now {seconds['now'] / 60:.1f}, {found['ratio']:.2f} of it. The whole suite takes "
        f"{found['whole']['now'] / 60:.1f} ({functions['now']:,} functions).\n"
    )


def short() -> str:
    """What a reader of README wants to know of speed."""
    dim: dict[str, Any] = {
        one["settings"]["classifier"]: one["ratio"] for one in lines("matching_step.jsonl", "matching_step/cifar10-cpu")
    }
    cached = [one["ratio"] for one in lines("logit_cache.jsonl", "logit_cache/answers")]
    help_ = only("startup.jsonl", "startup", command="train --help")
    rows = [
        ["a matching step against DiM's, an image, ConvNet", f"{dim['convnet']:.0f} ×"],
        ["the same, ResNet-18", f"{dim['resnet18_bn:32']:.0f} ×"],
        ["teachers' work with cached logits, against none", f"{min(cached):.1f} to {max(cached):.1f} ×"],
        ["`--help` against `import torch`", f"{help_['over']['import torch']:.0f} ×"],
    ]
    return table(["what", "as fast"], rows) + "\n"


FIGURES: dict[str, Callable[[], str]] = {
    "startup": startup,
    "student-steps": student_steps,
    "first-run": first_run,
    "steps": steps,
    "discriminator": discriminator,
    "against-dim": against_dim,
    "cache": cache,
    "tests": tests,
    "speed-short": short,
}
