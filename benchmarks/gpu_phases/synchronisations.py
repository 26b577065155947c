"""How often a training step makes the host wait for the device."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_phases import Line, Task
from gpu_phases.bench import FIRST_WARM, SMALL, STEPS, Bench, synchronize

MEASURED = 3
"""Steps, of which the mean is told."""


class Waits(TorchDispatchMode):
    """Counts operations, those that give the host a number of a tensor on ``device``, and copies between the host and a GPU."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device.type
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._overloadpacket.__name__
        self.found["operations"] += 1
        if name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero") and args[0].device.type == self._device:
            self.found["numbers on the host"] += 1
        tensors = [t for t in (*args[:2], out) if isinstance(t, torch.Tensor)]
        if name in ("_to_copy", "copy_") and len({t.device.type for t in tensors}) > 1:
            waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            self.found["blocking copies" if waits else "other copies"] += 1
        return out


def find(task: Task) -> Iterator[Line]:
    """A line for each step, of gan and matching for each start: counts a step, and what CUDA itself reports, and where."""
    for start in ("noise", "gaussian"):
        # No interval ends in the steps measured: there the host does read, for histograms.
        settings = [*SMALL, "--precision", "bf16", "--gan.start", start, "--matching.interval", "12"]
        bench = Bench(task.out / "data", task.out / f"synchronisations-{start}", task.device, settings)
        for step in STEPS if start == "noise" else ("gan", "matching"):
            yield {"step": step, "start": start, **counted(bench, step)}


def counted(bench: Bench, step: str) -> Line:
    """Operations and waits of a step, on a GPU the synchronisations that CUDA reports too."""
    with bench.trainee(step) as trainee:
        batches = [trainee.read(i) for i in range(FIRST_WARM + 2 * MEASURED)]
        for i in range(FIRST_WARM):
            trainee.train(i, batches[i])
        with Waits(bench.ctx.device) as waits:
            for i in range(FIRST_WARM, FIRST_WARM + MEASURED):
                trainee.train(i, batches[i])
        counts = {name: n / MEASURED for name, n in waits.found.items()}
        reported, places = waiting(bench.ctx.device, lambda i, t=trainee, b=batches: t.train(i, b[i]))
    assert counts["operations"] > 0
    return {"a_step": counts, "reported": reported, "places": places}


def waiting(device: torch.device, train: Any) -> tuple[float | None, list[str]]:
    """Synchronisations a step that CUDA reports, and the lines that cause them, the most frequent first; None on a CPU, which has none."""
    if device.type != "cuda":
        return None, []
    synchronize(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for i in range(FIRST_WARM + MEASURED, FIRST_WARM + 2 * MEASURED):
            train(i)
        torch.cuda.set_sync_debug_mode("default")
    found = Counter(
        f"{w.filename.rpartition('site-packages/')[2]}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)
    )
    return sum(found.values()) / MEASURED, [f"{place} × {n}" for place, n in found.most_common(12)]
