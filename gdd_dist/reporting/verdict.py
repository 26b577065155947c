"""The answer to "did it work?" on the report's first screen: differences of paired students with their noise.

A pair is two students of one seed: they share initial weights, order, latents and augmentation, whatever they train on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gdd_dist.evaluation.kinds import kind_of
from gdd_dist.reporting.tables import markdown

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t above which a difference is significant (two-sided, 5 %), for 1, 2, … degrees of freedom; above 10 degrees, the
stricter value of 10 is used."""
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
"""Generators that matching must beat to have worked."""

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """A difference of paired students, in points of accuracy. ``stderr``: of the mean; None with a single pair."""

    mean: float
    stderr: float | None
    pairs: int

    @property
    def shown(self) -> bool:
        """Whether the noise of students would give a mean so far from 0 in less than 5 % of such comparisons."""
        if self.stderr is None:
            return False
        return abs(self.mean) > T_95[min(self.pairs - 1, len(T_95)) - 1] * self.stderr

    def __str__(self) -> str:
        return f"{self.mean:+.1f}" + ("" if self.stderr is None else f" ± {self.stderr:.1f}")


def difference(ours: Result, other: Result) -> Difference:
    """Return ``ours`` minus ``other``, over the student seeds of both rows. Raises ValueError if they share none."""
    theirs = dict(zip(other["seeds"], other["accuracies"], strict=True))
    pairs = [a - theirs[seed] for seed, a in zip(ours["seeds"], ours["accuracies"], strict=True) if seed in theirs]
    if not pairs:
        raise ValueError("the rows share no student seed")
    stderr = float(np.std(pairs, ddof=1) / len(pairs) ** 0.5) if len(pairs) > 1 else None
    return Difference(float(np.mean(pairs)), stderr, len(pairs))


def first_screen(results: Sequence[Result]) -> dict[str, Result]:
    """Return label → row: the first matched row and its rivals, the floor first, the ceiling last."""
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
    """Return the differences of the first matched row to each other row."""
    label, ours = next((label, r) for label, r in shown.items() if r["train_on"] == "matched")
    return {other: difference(ours, r) for other, r in shown.items() if other != label}


def answer(found: Mapping[str, Difference]) -> str:
    """Return the verdict: is the matched generator better than the GAN and the trivial generator?"""
    rivals = {NAMES[name]: found[name] for name in RIVALS if name in found}
    better = [name for name, d in rivals.items() if d.shown and d.mean > 0]
    worse = [name for name, d in rivals.items() if d.shown and d.mean < 0]
    rest = [name for name, d in rivals.items() if not d.shown]
    word = "No" if worse else "Not shown" if not better else "In part" if rest else "Yes"
    parts = [("better than ", better), ("worse than ", worse), ("no difference beyond noise from ", rest)]
    told = "; ".join(text + " and ".join(names) for text, names in parts if names)
    return f"**Did it work? {word}.** The matched generator: {told or 'no other generator was measured'}."


def comparison(found: Mapping[str, Difference]) -> str:
    """Return the differences as a Markdown table, with a note on their meaning."""
    lines = [[NAMES.get(name, name), str(d), said(d)] for name, d in found.items()]
    pairs = max((d.pairs for d in found.values()), default=0)
    note = (
        f"Difference: mean ± standard error over {pairs} {'pair' if pairs == 1 else 'pairs'} of students with the same seed. "
        "*Shown*: beyond the noise of students (paired t-test, two-sided, 5 %). It does not include the noise of training another generator."
    )
    return f"{markdown(('matched against', 'points', 'a difference is'), lines)}\n\n{note}"


def said(d: Difference) -> str:
    """Return whether a difference is significant, and its direction."""
    return ("shown" if d.mean > 0 else "shown: worse") if d.shown else "not shown"
