"""Stratified sampling: each group of entries is cut into equal strata, and one entry of each stratum is sampled.

The sampled entries are distinct and ascending, without a sort and without a second draw, for all groups at once. The
k-th entry comes from the same region of the parameters at every step, so that a network can learn from it.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradkern.ops.capture import ready
from gradkern.ops.layout import Tables


@dataclass(frozen=True, eq=False)
class Strata(Tables):
    """The strata of S consecutive groups. Made by :func:`strata`.

    Attributes:
        counts: the number of entries that are sampled from each group.
        starts: (D,) int64, the position of each stratum's first entry, counted through all groups.
        widths: (D,) int64, the number of entries of each stratum.
        places: (D,) int64, the position of each sampled entry in S rows as long as the largest count.
    """

    counts: tuple[int, ...]
    starts: NDArray[np.int64]
    widths: NDArray[np.int64]
    places: NDArray[np.int64]

    def sample(self, device: torch.device, generator: torch.Generator | None) -> Tensor:
        """Sample one entry of each stratum, all equally likely: (D,) int64, ascending."""
        starts, widths, _ = self._on(device)
        # u <= 1 - 2⁻⁵³, so u times a stratum's width, rounded, stays below the width.
        u = torch.rand(len(starts), generator=generator, dtype=torch.float64, device=device)
        return starts + (u * widths).long()

    def tokens(self, X: Tensor) -> Tensor:
        """Return X (T, D) as (S, T, d), where d is the largest count; zeros pad the entries of smaller groups."""
        S, T, d = len(self.counts), len(X), max(self.counts)
        rows = X.new_zeros((T, S * d)).index_copy_(1, self._on(X.device)[2], X)
        return rows.view(T, S, d).transpose(0, 1)

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        return ready(self, device)._once((device,), lambda: (self.starts, self.widths, self.places))


@lru_cache(maxsize=64)
def strata(sizes: tuple[int, ...], most: int) -> Strata:
    """Return the strata of groups of ``sizes[s]`` entries, at most ``most`` per group; cached for the next step."""
    counts = tuple(min(size, most) for size in sizes)
    starts, widths, places, first = [], [], [], 0
    for s, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        bounds = np.arange(count + 1, dtype=np.int64) * size // max(count, 1)
        starts.append(first + bounds[:-1])
        widths.append(np.diff(bounds))
        places.append(s * max(counts) + np.arange(count, dtype=np.int64))
        first += size
    return Strata(counts, *map(np.concatenate, (starts, widths, places)))
