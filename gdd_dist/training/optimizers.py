"""torch's own SGD and Adam without torch._dynamo, which takes as long to load as torch itself; here nothing is compiled.

torch wraps some methods of its optimizers for torch.compile. These wrappers load torch._dynamo at the first call, whether or not
anything is compiled. The classes here have the same methods without the wrappers: the same numbers and the same state.
"""

from __future__ import annotations

import inspect
from typing import TypeVar

import torch

_WRAPPED = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
Kind = TypeVar("Kind", bound=torch.optim.Optimizer)


def _unwrapped(kind: type[Kind]) -> type[Kind]:
    """A subclass of the same name whose methods are as they stand in torch's source."""
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in _WRAPPED}
    return type(kind.__name__, (kind,), {**methods, "step": torch.no_grad()(inspect.unwrap(kind.step))})


SGD = _unwrapped(torch.optim.SGD)
Adam = _unwrapped(torch.optim.Adam)
