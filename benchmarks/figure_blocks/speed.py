"""Figures of speed as ratios: against an earlier version, and without what makes it fast."""

from __future__ import annotations

from collections.abc import Callable

from figure_blocks.records import lines, table

BEFORE = "e9ace49"
SIZES = {"digits": "digits", "cifar10-trial": "CIFAR-10's trial"}


def startup() -> str:
    """How long commands take to answer, beside torch's import and an earlier version."""
    rows = [
        [
            one["settings"]["command"],
            f"{1 / one['over']['import torch']:.2f}",
            f"{1 / one['over'][BEFORE]:.2f}",
        ]
        for one in lines("startup.jsonl")
    ]
    head = ["command", "time, as a share of `import torch`", f"as a share of the same at {BEFORE}"]
    return table(head, rows) + "\n\nMedians of 3 rounds on two idle cores.\n"


def student_steps() -> str:
    """Steps of the report's students beside an earlier version, by CPU time."""
    rows = [[one["benchmark"].partition("/")[2], f"{one['ratio']:.2f} ×"] for one in lines("students.jsonl")]
    return (
        table(["student", f"steps a CPU second, over {BEFORE} (last row: over one by one)"], rows)
        + "\n\nMedians of 3 rounds on two busy cores.\n"
    )


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
    "steps": steps,
}
