"""A condensed set, drawn once by `training.condense`, that is written as any other drawn set is."""

import numpy as np
import torch
from torch import Tensor

from gdd_dist.product.sampler import Sampler


class CondensedSet(Sampler):
    """A run's sampler whose ``balanced`` images are one finished set, uint8 [K · IPC, C, H, W] in the order of classes."""

    def __init__(self, sampler: Sampler, images: Tensor) -> None:
        self.__dict__.update(sampler.__dict__)
        self._set = images.unflatten(0, (len(self.classes), -1))

    def balanced(
        self, total: int, seed: int = 0, truncation: float | None = None, first: int = 0, select: int = 1
    ) -> tuple[Tensor, np.ndarray]:
        """Return images ``first`` … of the set, uint8 [N, C, H, W], and their labels 0, 1, …, K-1, 0, 1, …, int64 [N]."""
        turns, labels = np.divmod(np.arange(first, first + total), len(self.classes))
        return self._set[torch.from_numpy(labels), torch.from_numpy(turns)], labels
