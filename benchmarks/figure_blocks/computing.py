"""Figures of computing: checkpoints, engines, ranks, busy machines, a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable

from figure_blocks.records import RESULTS, lines, only, table


def checkpoint() -> str:
    cost, kill = only("checkpoint.jsonl", "checkpoint cost"), only("checkpoint.jsonl", "after a kill")
    return (
        f"The GAN of the digits, {cost['settings']['ranks']} ranks on 2 cores beside other jobs, once: saving takes "
        f"{100 * cost['share']:.2f} % of the time.\nAfter a kill in the middle of an interval, {kill['seconds_of_work_repeated']:.0f} s of work "
        f"are repeated.\nThe first new step comes {kill['seconds_to_first_new_step']:.0f} s after the kill; most of that is the start of Python "
        "and torch.\n"
    )


def engines() -> str:
    rows = [
        [one["benchmark"].partition("/")[2].replace("zero_", "ZeRO "), f"{one['ratio']:.2f}",
         f"{min(one['ratios']):.2f} to {max(one['ratios']):.2f}"]
        for one in lines("engines.jsonl")
    ]  # fmt: skip
    one = lines("engines.jsonl")[0]["settings"]
    return (
        table(["engine", "images/s over DDP's, median", "range"], rows)
        + f"\n\n{one['ranks']} ranks on two idle cores, {one['rounds']} rounds; width {one['width']}, {one['size']} pixels, {one['batch']} "
        f"images a rank, {one['precision']}. A difference counts where the range does not hold 1.\n"
    )


def scaling() -> str:
    head = [
        "step",
        "ranks",
        "images/s",
        "step, s",
        "compute",
        "data",
        "communication",
        "bytes a step, formula",
        "counted",
    ]
    rows = []
    for one in lines("scaling.jsonl"):
        seconds, sent = one["seconds_a_step"], one["bytes_sent_a_step"]
        over = f" (+{100 * sent['counted'] / sent['formula'] - 100:.1f} %)" if sent["formula"] else ""
        rows.append(
            [one["benchmark"].partition("/")[2], str(one["settings"]["ranks"]), f"{one['ours']:.0f}"]
            + [f"{seconds[k]:.3f}" for k in ("step", "compute", "data", "communication")]
            + [f"{sent['formula']:,}", f"{sent['counted']:,}{over}"]
        )
    return table(head, rows) + "\n"


def busy() -> str:
    """A step on all cores beside other work, by how its threads wait for each other."""
    found = lines("busy.jsonl")
    head = [
        "busy loops beside it",
        "short spin, ms",
        "long spin, ms",
        "no spin, ms",
        "one thread, ms",
        "long over short",
    ]
    rows = [
        [
            str(one["settings"]["loops"]),
            *(f"{one['milliseconds'][way]:.1f}" for way in ("short", "default", "sleep", "one")),
            f"{one['ratio']:.1f} ×",
        ]
        for one in found
    ]
    return table(head, rows) + (
        f"\n\nA training step of 20 images, ConvNet of width 32, on two cores. Medians of {found[0]['settings']['rounds']} rounds.\n"
    )


GPU_RECORD = "gpu-h200.jsonl"
SWITCHES = {
    "bf16": "bf16",
    "deterministic": "bf16, deterministic",
    "channels_first": "bf16, channels first",
    "tf32": "tf32",
}


def gpu() -> str:
    """What one GPU did: agreement with the CPU, and how fast the steps were that ran."""
    found = [json.loads(text) for text in (RESULTS / GPU_RECORD).read_text().splitlines()]
    name = next(one["gpu"]["name"] for one in found if "gpu" in one)
    off = {
        precision: max(one["off"] for one in found if one.get("precision") == precision)
        for precision in ("float32", "bf16")
    }
    rows = [
        [
            one["step"] + (f", {one['architecture']}" if one["architecture"] else ""),
            SWITCHES[one["variant"]],
            f"{one['images_per_second']:,.0f}",
            f"{1e3 * one['seconds']:.1f}",
            f"{1e3 * one['busy_seconds']:.1f}",
            f"{one['launches']:,}",
            f"{100 * one['share_of_bf16_peak']:.1f}",
        ]
        for one in found
        if "images_per_second" in one and "step" in one
    ]
    head = ["step", "switches", "images/s", "step, ms", "GPU busy, ms", "kernels started", "% of bf16's peak"]
    failed = [one["phase"] for one in found if one.get("status") == "failed" and "/" not in one["phase"]]
    return table(head, rows) + (
        f"\n\nOne {name}, preset cifar10, 256 images a step.\nThe first five losses of teachers, gan, matching and a student were those of the "
        f"CPU: at most {off['float32']:.1g} apart in float32, {off['bf16']:.1g} in bf16 (relative).\nWhat failed, and its cause, are in the "
        f"record: {', '.join(failed)}.\n"
    )


FIGURES: dict[str, Callable[[], str]] = {
    "gpu": gpu,
    "busy": busy,
    "checkpoint": checkpoint,
    "engines": engines,
    "scaling": scaling,
}
