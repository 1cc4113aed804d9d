"""The rows of a small model's step: all task gradients in one matrix.

In a small model the time goes into calls, a few for each tensor and task. So the gradients of a task are copied into
one vector after its backward pass, in one call, and then nothing needs to know how autograd laid them out, or who else
refers to them. The vectors make a matrix, whose Gramian and combination are one call each.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from gradkern.gradients.layouts import Layouts, Row
from gradkern.gradients.plan import Arrangement, Column
from gradkern.ops import operators
from gradkern.ops.dtypes import arithmetic_dtype
from gradkern.ops.registry import is_watched
from gradkern.step.blocks import Blocks, Pieces, plan
from gradkern.step.of_params import OfParams
from gradkern.step.rows import Combined

LARGEST = 1 << 19
"""The number of elements of all task gradients up to which a copy takes less time than the calls that it saves."""


def fits(layouts: Layouts, n_tasks: int) -> bool:
    """Return whether the rows of a step may be a matrix.

    Parameters have one dtype of 32 or 64 bits (a combination of 16 bits would be rounded before an update's step along
    it), are contiguous and small, and on a device that the PyTorch back end serves: a GPU's own back end takes six
    launches for any number of tensors, and copies would be T + 1 more. A step under FakeTensorMode or another mode
    keeps its tensors, as it would on a GPU.
    """
    if not layouts.flattens or n_tasks * layouts.numel > LARGEST or is_watched() or torch.compiler.is_compiling():
        return False
    return layouts.device.type not in operators.gramian_tensors.implementations


class Flat(NamedTuple):
    """The gradients of one task, one after another in one vector, and the layouts that autograd gave them."""

    vector: Tensor
    reach: tuple[torch.layout | None, ...]

    def views(self, params: Sequence[Tensor]) -> Row:
        """Return the gradients as views of the vector."""
        reached = [p.numel() for p, kind in zip(params, self.reach, strict=True) if kind is not None]
        pieces = iter(self.vector.split_with_sizes(reached))
        return [None if kind is None else next(pieces).view_as(p) for p, kind in zip(params, self.reach, strict=True)]


def flattened(row: Row, layouts: Layouts) -> Flat | None:
    """Return a copy of the gradients in one vector; None if one is sparse, or not of the parameters' dtype."""
    reach = layouts.fitting_reach_of(row) or layouts.reach_of(row)
    if reach == layouts.all_dense and len(row) > 1:
        vector = _flatten_dense_tensors(row)
    elif _DENSE.issuperset(reach) and reach != layouts.none:
        vector = torch.cat([g.flatten() for g in row if g is not None])
    else:
        return None
    return Flat(vector, reach) if vector.dtype == layouts.dtypes[0] else None


_DENSE = frozenset((torch.strided, None))


class FlatRows(OfParams):
    """The T task gradients of a step as vectors.

    Args:
        params: n parameters.
        vectors: the gradients of each task, as :func:`flattened` returns them; None for an absent task.
        arrangement: the columns of the gradients.
        losses, loss_scale: as for :class:`gradkern.step.rows.Rows`.

    Attributes:
        blocks: the gradients of shared parameters, S matrices (T, width). Some have columns of zeros at the end.
    """

    mask = None
    present = None
    eps = None

    def __init__(
        self,
        params: Sequence[Tensor],
        vectors: Sequence[Tensor | None],
        arrangement: Arrangement,
        losses: Tensor | None = None,
        loss_scale: Tensor | None = None,
    ) -> None:
        self.params = params
        self.arrangement = arrangement
        self.losses = losses
        self.loss_scale = loss_scale
        self.n_tasks = len(vectors)
        self.n_segments = arrangement.n_segments
        self._plan = plan(arrangement, self.n_tasks)
        pieces: Pieces = [
            () if vector is None else vector.split_with_sizes(lengths) if len(lengths) > 1 else (vector,)
            for vector, lengths in zip(vectors, self._plan.lengths, strict=True)
        ]
        self._like = next(vector for vector in vectors if vector is not None)
        self.blocks = self._plan.shared.of(pieces, self._like)
        self._pieces = pieces if self._plan.unshared is not None else ()  # the blocks are copies, so vectors can go

    def shared_grads(self) -> Iterator[tuple[Column, list[Tensor]]]:
        """Yield each column under surgery, and the gradients of the tasks that reach it, as vectors."""
        columns = {c.place: c for c in self.arrangement.shared}
        for block, places in zip(self.blocks, self._plan.shared.places, strict=True):
            start = 0
            for c in map(columns.__getitem__, places):
                yield c, [block[t, start : start + c.numel] for t in c.tasks]
                start += c.numel

    def gramian(self, unshared: bool) -> Tensor:
        """Return the dot products of the task gradients within each group; see :meth:`Rows.gramian`."""
        blocks = [*self.blocks, *self._unshared()] if unshared else self.blocks
        return torch.stack([operators.gramian(block) for block in blocks])

    def combine(self, w: Tensor, unshared_weights: Tensor | None) -> Combined:
        """Return each parameter with its combination; see :meth:`Rows.combine`."""
        weights = w.to(arithmetic_dtype(self.blocks[0].dtype))
        combined = [operators.combine(block, w_s) for block, w_s in zip(self.blocks, weights, strict=True)]
        return self.results(combined, unshared_weights), None

    def results(self, combined: Sequence[Tensor], unshared_weights: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Return each parameter with its gradient, in memory of its own, in the order of the parameters.

        Args:
            combined: the combinations of :attr:`blocks`, each (width,).
            unshared_weights: (T,), the weights of unshared parameters' gradients; None for ones.
        """
        parts = self._plan.shared.results(combined, self.params)
        if self._plan.unshared is not None:
            parts += self._unshared_results(self._plan.unshared, unshared_weights)
        places, order, params = self._plan.places, self._plan.order, self.params
        if order is not None:
            parts = [parts[i] for i in order]
        reached = params if len(places) == len(params) else [params[k] for k in places]
        return list(zip(reached, _clones(parts), strict=True))

    def _unshared_results(self, unshared: Blocks, w: Tensor | None) -> list[Tensor]:
        if w is None and self._plan.own is not None:
            return self._plan.own.results(self._pieces, self.params)
        (U,) = self._unshared()
        ones = torch.ones(self.n_tasks, dtype=arithmetic_dtype(U.dtype), device=U.device)
        return unshared.results([operators.combine(U, ones if w is None else w.to(ones.dtype))], self.params)

    def _unshared(self) -> list[Tensor]:
        """Return the gradients of unshared parameters, one matrix (T, width)."""
        if self._plan.unshared is None:
            return [self.blocks[0].new_empty(self.n_tasks, 0)]
        return self._plan.unshared.of(self._pieces, self._like)


def _clones(tensors: list[Tensor]) -> Sequence[Tensor]:
    return torch._foreach_clone(tensors) if _HAS_FOREACH_CLONE and tensors else [x.clone() for x in tensors]


_HAS_FOREACH_CLONE = hasattr(torch, "_foreach_clone")  # private API of PyTorch, which may lack it
