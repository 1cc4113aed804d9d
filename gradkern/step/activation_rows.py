"""The rows of a step through activations, of which there is only the Gramian, and for ``finish="kept"`` the factors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradkern.gradients.activations.graphs import Graphs
from gradkern.gradients.activations.products import Passed, Weight, weighted_grad
from gradkern.gradients.param_grads import as_grad
from gradkern.gradients.plan import Arrangement, Column
from gradkern.modifiers.suppression import MaskState
from gradkern.ops import operators
from gradkern.ops.arguments import TaskGrads
from gradkern.ops.dtypes import arithmetic_dtype
from gradkern.step.masked import kept_share, mask_of
from gradkern.step.of_params import OfParams
from gradkern.step.rows import Combined, Rows, eps_of


@dataclass
class ActivationRows(OfParams):
    """The task gradients of a step, as far as their Gramian goes. Torch's own backward pass makes the update.

    Attributes:
        params: n parameters.
        graphs: the graphs of the losses.
        arrangement: the columns of the gradients.
        products: (S, T, T), the Gramians.
        exact: (S, T, T), the exact ones beside a sketch that reports its error; None without.
        n_tasks: T.
        mask, present, losses, loss_scale: as for :class:`gradkern.step.rows.Rows`.
    """

    params: Sequence[Tensor]
    graphs: Graphs
    arrangement: Arrangement
    products: Tensor
    exact: Tensor | None
    n_tasks: int
    mask: MaskState | None = None
    present: Tensor | None = None
    losses: Tensor | None = None
    loss_scale: Tensor | None = None

    @property
    def n_segments(self) -> int:
        """The number of groups, S."""
        return self.arrangement.n_segments

    @property
    def eps(self) -> tuple[float, ...] | None:
        """See :attr:`gradkern.step.rows.Rows.eps`."""
        return eps_of(self.arrangement)

    @property
    def conflict_agreement(self) -> Tensor | None:
        """The share of task pairs of whose conflict sketch and exact Gramian agree, (); None without a report."""
        if self.exact is None:
            return None
        lengths = self.exact.diagonal(dim1=-2, dim2=-1)
        pairs = ((lengths.unsqueeze(-1) != 0) & (lengths.unsqueeze(-2) != 0)).triu(1)
        agree = (self.exact < 0) == (self.products < 0)
        return (agree & pairs).sum() / pairs.sum()

    def shared_grads(self) -> Iterator[tuple[Column, list[Tensor]]]:
        """Yield nothing: the gradients under surgery are not there."""
        return iter(())

    def gramian(self, unshared: bool) -> Tensor:
        """Return the Gramians, (S, T, T)."""
        assert not unshared, "no sink of such a step needs the others"
        return self.products

    def combine(self, w: Tensor, unshared_weights: Tensor | None) -> Combined:
        """Return no results: the sink's backward pass makes them."""
        return [], None


@dataclass
class KeptRows(ActivationRows):
    """The task gradients of a step as factors: what went into layers, and what came back from each task.

    Attributes:
        factors: the weights that have factors, each with these.
        rows: the task gradients of all other parameters.
    """

    factors: list[tuple[Weight, list[Passed]]] = field(kw_only=True)
    rows: Rows = field(kw_only=True)

    def combine(self, w: Tensor, unshared_weights: Tensor | None) -> Combined:
        """Return each parameter with its combination; see :meth:`gradkern.step.rows.Rows.combine`."""
        found = self._combined(w, unshared_weights)
        kept = self._masked(found)
        return [(p, found[p]) for p in self.params if p in found], kept

    def _combined(self, w: Tensor, unshared_weights: Tensor | None) -> dict[Tensor, Tensor]:
        results, _ = self.rows.combine(w, unshared_weights)
        found = dict(results)
        self.rows.forget()  # before the weights' gradients take memory
        columns = {c.place: c for c in self.arrangement.columns}
        while self.factors:
            weight, passed = self.factors.pop()
            c = columns[weight.place]
            found[weight.param] = as_grad(weighted_grad(passed, w[c.segment]), weight.param, c.dtype)
        return found

    def _masked(self, found: dict[Tensor, Tensor]) -> Tensor | None:
        """Set the results' entries that the mask drops to zero; return the share of those that it kept."""
        columns = [c for c in self.arrangement.columns if not c.sparse and self.params[c.place] in found]
        if self.mask is None or not columns:
            return None
        kept = self.mask.state.new_zeros(())
        for c in columns:
            g = found[self.params[c.place]]
            g = torch.view_as_real(g) if g.is_complex() else g
            one = torch.ones((1, 1), dtype=arithmetic_dtype(g.dtype), device=g.device)
            operators.combine_tensors(TaskGrads([g], [0], 1), one, [g], mask_of([c.unit], self.mask), kept)
        return kept_share(kept, columns)
