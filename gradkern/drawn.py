"""The entries of the shared parameters' gradients that a step has drawn: all that GradAttention looks at.

They are read once, into a matrix X (T, D) that holds the groups one after another; the Gramian and the combinations of
the drawn entries alone are those of X.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gradkern import rows
from gradkern.aggregators.base import PerDevice
from gradkern.ops.philox import dropped_at
from gradkern.rows import Column
from gradkern.suppression import Mask

ops = torch.ops.gradkern


class Drawn:
    """Which entries of ``columns`` are drawn.

    Args:
        columns: as :func:`rows.columns` gives them; sparse gradients among the shared ones are made dense.
        n_segments: S.
        positions: given n and a device, the ascending numbers below n of the entries to draw from n.
    """

    def __init__(
        self, columns: Sequence[Column], n_segments: int, positions: Callable[[int, torch.device], Tensor]
    ) -> None:
        self.columns = columns
        members = [[c for c in columns if c.segment == s] for s in range(n_segments)]
        self.shared = rows.dense([c for group in members for c in group])
        self.numels = [c.param.numel() for c in self.shared]
        sizes = [sum(c.param.numel() for c in group) for group in members]
        device = columns[0].param.device
        draws = [positions(size, device) for size in sizes]
        self.counts = [len(draw) for draw in draws]
        firsts = [0, *accumulate(sizes)][:-1]
        self.index = torch.cat([first + draw for first, draw in zip(firsts, draws, strict=True)])

    def entries(self, mask: Mask | None) -> Tensor:
        """X (T, D), zeros where ``mask`` drops an entry; float64 if any gradient is, else float32."""
        grads = rows.row_major(self.shared)
        found = [
            ops.gather([g if g is not None and g.dtype == dtype else None for g in grads], self.numels, self.index)
            for dtype in self._dtypes()
        ]
        if not found:
            return torch.zeros((len(self.columns[0].grads), 0), device=self.index.device)
        X = sum(found[1:], found[0])  # every entry is of one dtype and reads 0 in the others
        return X if mask is None else X.masked_fill(self._dropped(mask), 0.0)

    def gramian(self, X: Tensor) -> Tensor:
        """(S, T, T), the dot products of the drawn entries."""
        return ops.gramian(self._pieces(X), list(range(len(self.counts))), len(self.counts))

    def tokens(self, X: Tensor) -> Tensor:
        """X as (S, T, d), with zeros after the entries of a group that has fewer."""
        return pad_sequence(X.mT.split(self.counts), batch_first=True).mT

    def combine(
        self, X: Tensor, w: Tensor, plain: Tensor, mask: Mask | None
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
        """As :func:`rows.combine`, the result of a shared parameter being 0 wherever no entry is drawn."""
        values = X.new_empty(X.shape[1])
        ops.combine(self._pieces(X), w.to(X.dtype), list(range(len(self.counts))), list(values.split(self.counts)))
        kept = None
        if mask is not None:
            dropped = self._dropped(mask)
            values = values.masked_fill(dropped, 0.0)
            kept = 1 - dropped.float().mean() if len(dropped) else None
        out = [torch.zeros_like(c.param, dtype=c.dtype) for c in self.shared]
        for dtype in self._dtypes():
            of_dtype = [g if g.dtype == dtype else g.new_empty(0, dtype=dtype) for g in out]
            ops.scatter(values, self.numels, self.index, of_dtype)
        results, _ = rows.combine([c for c in self.columns if c.segment is None], w, plain, None)
        return [*results, *((c.param, g) for c, g in zip(self.shared, out, strict=True))], kept

    def _pieces(self, X: Tensor) -> list[Tensor]:
        """X as one tensor for each task and group."""
        return [piece for row in X for piece in row.split(self.counts)]

    def _dtypes(self) -> list[torch.dtype]:
        return list(dict.fromkeys(c.dtype for c in self.shared))

    def _dropped(self, mask: Mask) -> Tensor:
        """(D,) bool."""
        device = self.index.device
        ends = _table(tuple(accumulate(self.numels))).on(device, torch.int64)
        starts = _table((0, *accumulate(self.numels))).on(device, torch.int64)
        units = _table(tuple(c.unit for c in self.shared)).on(device, torch.int64)
        k = torch.searchsorted(ends, self.index, right=True)
        return dropped_at(units[k] + (self.index - starts[k]) // mask.block, mask.words)


@lru_cache(maxsize=64)
def _table(values: tuple[int, ...]) -> PerDevice:
    return PerDevice(list(values))
