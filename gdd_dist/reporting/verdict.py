"""Did it work? The answer on the report's first screen: differences of paired students with their noise.

A pair is two students of one seed: they share initial weights, order, latents and augmentation, whatever they train on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gdd_dist.evaluation.kinds import kind_of
from gdd_dist.reporting.tables import markdown

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t beyond which a difference is shown (two-sided, 5 %), for 1, 2, … degrees of freedom; for more than 10 that of 10, which
is stricter."""
FLOOR, CEILING = "real, drawn once (the floor)", "real, drawn anew (the ceiling)"
TRIVIAL = "gaussian (the trivial generator)"
NAMES = {
    "gan": "the GAN before matching",
    TRIVIAL: "the trivial generator, a Gaussian per class",
    "equal_bytes": "real images in the bytes of the generator",
    FLOOR: "as many real images, drawn once (the floor)",
    CEILING: "real images drawn anew each epoch (the ceiling)",
}
RIVALS = ("gan", TRIVIAL)
"""What matching has to beat to have worked."""

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """Of paired students, in points of accuracy. ``stderr``: of the mean; None with a single pair."""

    mean: float
    stderr: float | None
    pairs: int

    @property
    def shown(self) -> bool:
        """Whether noise of students alone would give a mean as far from 0 in less than 5 % of such comparisons."""
        if self.stderr is None:
            return False
        return abs(self.mean) > T_95[min(self.pairs - 1, len(T_95)) - 1] * self.stderr

    def __str__(self) -> str:
        return f"{self.mean:+.1f}" + ("" if self.stderr is None else f" ± {self.stderr:.1f}")


def difference(ours: Result, other: Result) -> Difference:
    """``ours`` minus ``other``, over the student seeds that both rows have. Raises ValueError where they share none."""
    theirs = dict(zip(other["seeds"], other["accuracies"], strict=True))
    pairs = [a - theirs[seed] for seed, a in zip(ours["seeds"], ours["accuracies"], strict=True) if seed in theirs]
    if not pairs:
        raise ValueError("the rows share no student seed")
    stderr = float(np.std(pairs, ddof=1) / len(pairs) ** 0.5) if len(pairs) > 1 else None
    return Difference(float(np.mean(pairs)), stderr, len(pairs))


def first_screen(results: Sequence[Result]) -> dict[str, Result]:
    """Label → row: the first matched row and those beside it, the floor first, the ceiling last."""
    first = next(r for r in results if r["train_on"] == "matched")
    floor, middle, ceiling = dict[str, Result](), dict[str, Result](), dict[str, Result]()
    for r in results:
        if any(r[k] != first[k] for k in ("student", "ipc")):
            continue
        if kind_of(r) == "real":
            if (r["protocol"], r["labels"]) == ("fixed", first["labels"]):
                floor[FLOOR] = r
            elif (r["protocol"], r["labels"]) == ("regenerate", "hard"):
                ceiling[CEILING] = r
        elif all(r[k] == first[k] for k in ("protocol", "labels")):
            middle[TRIVIAL if kind_of(r) == "gaussian" else kind_of(r)] = r
    return floor | middle | ceiling


def differences(shown: Mapping[str, Result]) -> dict[str, Difference]:
    """The first matched row minus each other."""
    label, ours = next((label, r) for label, r in shown.items() if r["train_on"] == "matched")
    return {other: difference(ours, r) for other, r in shown.items() if other != label}


def answer(found: Mapping[str, Difference]) -> str:
    """Did it work: is the matched generator better than the GAN and than the trivial generator?"""
    rivals = {NAMES[name]: found[name] for name in RIVALS if name in found}
    better = [name for name, d in rivals.items() if d.shown and d.mean > 0]
    worse = [name for name, d in rivals.items() if d.shown and d.mean < 0]
    rest = [name for name, d in rivals.items() if not d.shown]
    word = "No" if worse else "Not shown" if not better else "In part" if rest else "Yes"
    parts = [("better than ", better), ("worse than ", worse), ("no difference beyond noise from ", rest)]
    told = "; ".join(text + " and ".join(names) for text, names in parts if names)
    return f"**Did it work? {word}.** The matched generator: {told or 'no other generator was measured'}."


def comparison(found: Mapping[str, Difference]) -> str:
    """The differences as a Markdown table, and what they mean."""
    lines = [[NAMES.get(name, name), str(d), said(d)] for name, d in found.items()]
    pairs = max((d.pairs for d in found.values()), default=0)
    note = (
        f"Difference: mean ± standard error over {pairs} {'pair' if pairs == 1 else 'pairs'} of students with the same seed. "
        "*Shown*: beyond the noise of students (paired t-test, two-sided, 5 %). The noise of training another generator is not in it."
    )
    return f"{markdown(('matched against', 'points', 'a difference is'), lines)}\n\n{note}"


def said(d: Difference) -> str:
    """Whether a difference is shown, and which way."""
    return ("shown" if d.mean > 0 else "shown: worse") if d.shown else "not shown"
