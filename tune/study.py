"""The results of a grid: each combination's mean over seeds, and its difference from the defaults, paired by seed.

Trials of one seed of matching share latents and draws, and all share teachers, logits and GAN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtr

from gdd_dist.reporting.tables import NONE
from gdd_dist.reporting.verdict import Difference, difference
from tune import space
from tune.arguments import GRID, METRICS
from tune.options import Search
from tune.record import FINISHED, Outcome, Record, best_of
from tune.space import counted


@dataclass(frozen=True)
class Arm:
    """A combination: its value of each axis, its finished trials by seed of matching, and what each of them reached, in percent."""

    values: tuple[Any, ...]
    trials: Mapping[int, Outcome]
    reached: Mapping[int, float]

    @property
    def mean(self) -> float:
        """Return the mean over seeds; -inf if no trial finished."""
        return float(np.mean(list(self.reached.values()))) if self.reached else float("-inf")

    @property
    def stderr(self) -> float | None:
        """Return the standard error of the mean over seeds; None with one seed."""
        found = list(self.reached.values())
        return float(np.std(found, ddof=1) / len(found) ** 0.5) if len(found) > 1 else None

    def minus(self, other: Arm) -> Difference | None:
        """Return the difference over the seeds that both have; None if there are none."""
        if not self.reached.keys() & other.reached.keys():
            return None
        mine, theirs = ({"seeds": list(a.reached), "accuracies": list(a.reached.values())} for a in (self, other))
        return difference(mine, theirs)


def arms(search: Search, record: Record) -> list[Arm]:
    """Return all combinations with trials that ended: the defaults first, the others in the order of the grid."""
    plain, first = space.values(search.axes, search.config), search.config.step_seed("matching")
    found: dict[tuple[Any, ...], dict[int, Outcome]] = {tuple(plain.values()): {}}
    for o in record.outcomes().values():
        values = tuple(o.settings.get(name, value) for name, value in plain.items())
        trials = found.setdefault(values, {})
        if o.status == FINISHED:
            trials[o.settings.get(space.SEED, first)] = o
    metric = search.options.metric
    return [Arm(v, t, {seed: o.value(metric) for seed, o in t.items()}) for v, t in found.items()]


def best(search: Search, record: Record) -> Outcome:
    """Return the best finished trial; of a grid, the first of the best combination. Raises UserError if none has finished."""
    found = best_of(record, search.options.metric)
    if search.options.algorithm != GRID:
        return found
    return next(iter(best_arm(search, record).trials.values()))


def best_arm(search: Search, record: Record) -> Arm:
    """Return the combination with the best mean among those with most seeds, the earliest of equals."""
    return max(arms(search, record), key=lambda a: (len(a.reached), a.mean))


def t_and_p(d: Difference) -> tuple[float, float] | None:
    """Return t and p of the two-sided paired t-test; None if the pairs have no noise."""
    if not d.stderr:
        return None
    t = d.mean / d.stderr
    return t, float(2 * stdtr(d.pairs - 1, -abs(t)))


def table(search: Search, record: Record) -> tuple[list[str], list[list[str]]]:
    """Return (header, lines): the defaults, then the other combinations, the best mean first."""
    plain, *others = arms(search, record)
    chosen = best_arm(search, record)
    names = [axis.leaf for axis in search.axes]
    header = [*names, "seeds", f"{search.options.metric} %", "against defaults, points", "t", "p"]
    lines = []
    for arm in [plain, *sorted(others, key=lambda a: -a.mean)]:
        own = [space.text(value) for value in arm.values]
        own[0] += (" (defaults)" if arm is plain else "") + (" *" if arm.values == chosen.values else "")
        d = None if arm is plain else arm.minus(plain)
        test = t_and_p(d) if d else None
        numbers = [f"{test[0]:.2f}", f"{test[1]:.2g}"] if test else [NONE, NONE]
        reached = points(arm, "") if arm.reached else NONE
        lines.append([*own, str(len(arm.reached)), reached, points(d) if d else NONE, *numbers])
    return header, lines


def points(of: Arm | Difference, sign: str = "+") -> str:
    """Return a mean with its standard error, if it has one, as text."""
    return f"{of.mean:{sign}.2f}" + ("" if of.stderr is None else f" ± {of.stderr:.2f}")


def said(search: Search, record: Record) -> str:
    """Return in words which combination is best, against the defaults."""
    plain, *others = arms(search, record)
    arm = best_arm(search, record)
    reached = f"{points(arm, '')} % over {counted(len(arm.reached), 'seed')}"
    if arm.values == plain.values:
        return f"No combination was better on val than the defaults: {reached}."
    names = ", ".join(f"{axis.leaf} {space.text(value)}" for axis, value in zip(search.axes, arm.values, strict=True))
    text = f"Best on val of {len(others)} combinations is {names}: {reached}"
    d = arm.minus(plain)
    return f"{text}, {points(d)} points against the defaults." if d else f"{text}."


def note(search: Search) -> str:
    """Return the explanation of the table for its reader."""
    o, lost = search.options, space.combinations(search.axes, search.config)[1]
    names = "; ".join(", ".join(f"{k} {space.text(v)}" for k, v in settings.items()) for settings in lost)
    test = (
        "t and p: paired t-test over seeds, two-sided, of each combination by itself: of twenty that change nothing, one has p < 0.05."
        if o.seeds > 1
        else "With one seed there is no test: --resume --seeds 3 adds seeds."
    )
    return (
        f"{o.metric}: {METRICS[o.metric]} (`--matching.select {search.config.matching.select}`), mean over seeds of matching ± standard error. "
        f"Differences are paired by seed. `*`: the best mean. {test} Only generators trained by matching are compared: candidates that it "
        "does not train, such as the Gaussian, have no row, even if they were kept."
        + (f" Left out, because they cannot be trained: {names}." if lost else "")
    )
