"""Stratified sampling of entries: one of each of so many equal strata of each group of entries.

Sampled so, they ascend and differ with no sort and no second draw, for all groups in one go; and the k-th of them comes
from the same region of the parameters at every step, so that something can be learned of it.
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
    """The strata of S groups that lie one after another. Made by :func:`strata`.

    Attributes:
        counts: the number of entries that are sampled from each group.
        starts: (D,) int64, where each stratum begins, counted through all groups.
        widths: (D,) int64, how many entries it has.
        places: (D,) int64, where its entry goes in S rows as long as the largest count.
    """

    counts: tuple[int, ...]
    starts: NDArray[np.int64]
    widths: NDArray[np.int64]
    places: NDArray[np.int64]

    def sample(self, device: torch.device, generator: torch.Generator | None) -> Tensor:
        """Return (D,) int64, ascending, an entry of each stratum, all equally likely."""
        starts, widths, _ = self._on(device)
        # u <= 1 - 2⁻⁵³, so that u times a stratum's width, rounded, stays below its end.
        u = torch.rand(len(starts), generator=generator, dtype=torch.float64, device=device)
        return starts + (u * widths).long()

    def tokens(self, X: Tensor) -> Tensor:
        """Return X (T, D) as (S, T, d), d the largest count, with zeros after the entries of a group that has fewer."""
        S, T, d = len(self.counts), len(X), max(self.counts)
        rows = X.new_zeros((T, S * d)).index_copy_(1, self._on(X.device)[2], X)
        return rows.view(T, S, d).transpose(0, 1)

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        return ready(self, device)._once((device,), lambda: (self.starts, self.widths, self.places))


@lru_cache(maxsize=64)
def strata(sizes: tuple[int, ...], most: int) -> Strata:
    """Return strata of groups of ``sizes[s]`` entries, ``most`` of each at most; they are kept for the next step."""
    counts = tuple(min(size, most) for size in sizes)
    starts, widths, places, first = [], [], [], 0
    for s, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        bounds = np.arange(count + 1, dtype=np.int64) * size // max(count, 1)
        starts.append(first + bounds[:-1])
        widths.append(np.diff(bounds))
        places.append(s * max(counts) + np.arange(count, dtype=np.int64))
        first += size
    return Strata(counts, *map(np.concatenate, (starts, widths, places)))
