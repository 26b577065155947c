"""Figures of speed as ratios: against an earlier version, and without what makes it fast."""

from __future__ import annotations

from collections.abc import Callable

from figure_blocks.records import lines, table


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


def allocator() -> str:
    """Training steps with memory kept, beside glibc's defaults."""
    found = lines("allocator.jsonl")
    rows = [
        [
            f"width {s['width']}, {s['size']} pixels, {s['batch']} images",
            f"{1000 / one['ours']:.0f}",
            f"{1000 / one['other']['defaults']:.0f}",
            f"{one['faults']['defaults']:,.0f}",
            f"{one['ratio']:.2f} ×",
        ]
        for one in found
        for s in [one["settings"]]
    ]
    head = ["step of a ConvNet", "memory kept, ms", "glibc's defaults, ms", "page faults then", "as fast"]
    return table(head, rows) + f"\n\nCPU time of one thread; medians of {found[0]['settings']['rounds']} rounds.\n"


FIGURES: dict[str, Callable[[], str]] = {
    "startup": startup,
    "student-steps": student_steps,
    "allocator": allocator,
}
