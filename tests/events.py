"""What TensorBoard shows of a run. Holds no test."""

from collections import defaultdict
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def points(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag → (step, value) of all scalars below a directory, in the order of TensorBoard, purged as TensorBoard does."""
    found = defaultdict(list)
    for run in sorted({p.parent for p in directory.rglob("events.out.tfevents.*")}):
        accumulator = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
        for tag in accumulator.Tags()["scalars"]:
            found[tag] += [(e.step, e.value) for e in accumulator.Scalars(tag)]
    return dict(found)


def others(directory: Path) -> dict[str, set[str]]:
    """Kind (images, histograms, tensors) → tags that are there."""
    found = defaultdict(set)
    for run in {p.parent for p in directory.rglob("events.out.tfevents.*")}:
        for kind, tags in EventAccumulator(str(run)).Reload().Tags().items():
            if isinstance(tags, list):
                found[kind] |= set(tags)
    return dict(found)


def scalars(directory: Path) -> dict[str, dict[int, float]]:
    """Tag → step → value; fails where a step has two points."""
    found = points(directory)
    for tag, values in found.items():
        steps = [s for s, _ in values]
        assert len(steps) == len(set(steps)), f"{tag} has a step twice: {steps}"
    return {tag: dict(values) for tag, values in found.items()}
