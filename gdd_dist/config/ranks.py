"""How many of the ranks take part in a step: a pure function of settings and ranks."""

from gdd_dist.config.settings import Config


def parts(config: Config, step: str) -> int:
    """Return into how many equal parts a batch can be split: images in gan, groups in matching, per micro-batch."""
    batch = int(getattr(config, step).batch)
    return batch // (config.matching.group if step == "matching" else 1) // config.accumulate


def taking_part(config: Config, step: str, world: int) -> int:
    """Return how many of ``world`` ranks do ``step``: in gan and matching the most that divide its parts, else all."""
    if step not in ("gan", "matching"):
        return world
    whole = parts(config, step)
    return next(n for n in range(min(world, whole), 0, -1) if whole % n == 0)


def idle(config: Config, world: int) -> str:
    """Return a message on how many ranks wait in which step, and which batch would use all; "" if none waits."""
    said = []
    for step in ("gan", "matching"):
        if (n := taking_part(config, step, world)) < world:
            unit = world * int(getattr(config, step).batch) // parts(config, step)
            batch = -(-int(getattr(config, step).batch) // unit) * unit
            said.append(
                f"{world - n} of {world} ranks wait during {step}, whose batch they cannot share evenly; --{step}.batch {batch} would use all"
            )
    return "; ".join(said)
