"""torch's own SGD and Adam without torch._dynamo, which takes as long to import as torch itself.

torch wraps some methods of its optimizers for torch.compile. These wrappers import torch._dynamo at the first call, even if
nothing is compiled. The classes here have the same methods without the wrappers, with the same results and the same state.
"""

from __future__ import annotations

import inspect
from typing import TypeVar

import torch

_WRAPPED = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
Kind = TypeVar("Kind", bound=torch.optim.Optimizer)


def _unwrapped(kind: type[Kind]) -> type[Kind]:
    """Return a subclass of the same name with torch's methods without their wrappers."""
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in _WRAPPED}
    return type(kind.__name__, (kind,), {**methods, "step": torch.no_grad()(inspect.unwrap(kind.step))})


SGD = _unwrapped(torch.optim.SGD)
Adam = _unwrapped(torch.optim.Adam)
