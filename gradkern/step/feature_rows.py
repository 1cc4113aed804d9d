"""The rows of a step through features: the tasks' gradients by a trunk's outputs, which weigh one pass of the trunk.

The gradient of task i by the features is H_i. The Gramian is that of H_1 … H_T in place of the task gradients, so it
needs the heads' backward passes only, and the trunk gets one pass, seeded by Σ w_i H_i. MGDA-UB (Sener and Koltun 2018,
"Multi-Task Learning as Multi-Objective Optimization") and Aligned-MTL-UB (Senushkin et al. 2023, "Independent Component
Alignment for Multi-Task Learning") take dot products over the features of all examples. LibMTL's ``rep_grad`` takes
those of sums over the batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradkern.distributed.comm import Comm
from gradkern.gradients.features import LossesOnFeatures
from gradkern.gradients.layouts import Row
from gradkern.gradients.param_grads import readable
from gradkern.gradients.parameters import Targets
from gradkern.gradients.plan import Column
from gradkern.ops import operators
from gradkern.ops.dtypes import arithmetic_dtype
from gradkern.step.gather import of_one_kind
from gradkern.step.mean_backward import mean_grads
from gradkern.step.rows import Combined, Rows


@dataclass(frozen=True, kw_only=True)
class FeatureRows(Rows):
    """The gradients of T tasks by the outputs of a trunk. Their combination gives each parameter its gradient.

    ``params``, ``grads`` and ``arrangement`` are of the trunk's outputs, all of which are under surgery. The seeds get
    memory of their own, because autograd may give a parameter of a head the same tensor as an output.

    Attributes:
        source: the losses, whose backward pass of the trunk has not run yet.
        targets: the n parameters.
        below: those below the outputs.
        heads: T rows of n gradients, None for parameters below the outputs.
        per_example: whether dot products are of whole gradients, and not of their sums over dimension 0.
        comm: the ranks of the step; None for this rank alone.
    """

    source: LossesOnFeatures
    targets: Targets
    below: Sequence[Tensor]
    heads: Sequence[Row]
    per_example: bool
    comm: Comm | None

    @property
    def of_step(self) -> Sequence[Tensor]:
        """The n parameters of the step."""
        return self.targets.tensors

    def shared_grads(self) -> Iterator[tuple[Column, list[Tensor]]]:
        """Yield nothing: no parameter below the outputs has a gradient of one task."""
        return iter(())

    def gramian(self, unshared: bool) -> Tensor:
        """Return the dot products of the gradients by the outputs, (1, T, T), the same bits on all ranks.

        The loss of task i is the mean over R ranks of L_ir. So its gradient by the features of rank r is H_ir / R.
        With ``per_example`` these are coordinates of their own, because other ranks have other examples:
        M_ij = Σ_r ⟨H_ir, H_jr⟩ / R². Without it the gradients are summed over the examples of all ranks first:
        M_ij = ⟨S_i, S_j⟩, where S_i = Σ_r s_ir / R is the mean of the ranks' sums s_ir.
        """
        assert not unshared, "the heads' gradients have no dot products"
        in_float64 = any(h.dtype.to_real() == torch.float64 for h in self.params)
        dtype = torch.float64 if in_float64 else torch.float32
        if self.per_example:
            M = super().gramian(False)
            return (M if self.comm is None else self.comm.summed(M) / self.comm.size**2).to(dtype)
        S = torch.stack([self._summed(row, dtype) for row in self.grads])
        if self.comm is not None:
            S = (self.comm.summed(S) / self.comm.size).to(dtype)
        return operators.gramian(S).unsqueeze(0)

    def _summed(self, row: Row, dtype: torch.dtype) -> Tensor:
        """Return a task's gradients, each summed over its dimension 0, one after another in a vector.

        An output without a dimension is not summed. Numbers of 16 bits are added up in float32.
        """
        sums = [torch.empty(0, dtype=dtype, device=self.device)]
        for g, h in zip(row, self.params, strict=True):
            if g is None:
                sums.append(sums[0].new_zeros(h.shape[1:].numel() * (2 if h.is_complex() else 1)))
            else:
                sums.append((g.sum(0, dtype=arithmetic_dtype(g.dtype)) if h.ndim else g).flatten().to(dtype))
        return torch.cat(sums)

    def combine(self, w: Tensor, unshared_weights: Tensor | None) -> Combined:
        """Run the trunk's backward pass, seeded by Σ_t w[0, t] H_t; return each parameter with its gradient.

        Another parameter has Σ_t unshared_weights[t] g_t. On several ranks the gradients are means over the ranks.

        Args:
            w: (1, T), the weights of the gradients by the outputs.
            unshared_weights: (T,), the weights of the heads' gradients; None for ones.
        """
        if self.comm is None:
            return self._combined(w, unshared_weights), None

        def here() -> Row:
            found = dict(self._combined(w, unshared_weights))
            return [found.get(p) for p in self.targets.tensors]

        return mean_grads(self.comm, self.targets, here), None

    def release(self) -> None:
        """Forget the gradients by the outputs: their combination has taken their place."""
        self.forget()

    def _combined(self, w: Tensor, unshared_weights: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Return :meth:`combine` of this rank alone.

        The trunk's gradients are one more row beside those of the heads, with the weight 1.
        """
        params, layouts, n_rows = self.targets.tensors, self.targets.layouts, self.n_tasks + 1
        rows = [*self.heads, readable(self._of_trunk(w), params, layouts)]
        arrangement = self.targets.arranged(tuple(map(layouts.reach_of, rows)), (False,) * len(params), None)
        weights = None if unshared_weights is None else torch.cat((unshared_weights, unshared_weights.new_ones(1)))
        of_params = Rows(params, of_one_kind(rows, arrangement, self.targets), arrangement, overwrite=True)
        return of_params.combine(w.new_zeros(1, n_rows), weights)[0]

    def _of_trunk(self, w: Tensor) -> Row:
        """Return the parameters' gradients from the trunk's backward pass."""
        seeds, _ = super().combine(w, None)
        if not seeds:
            return [None] * len(self.targets.tensors)
        grads = self.source.trunk_pass([h for h, _ in seeds], [g for _, g in seeds], self.below)
        found = dict(zip(self.below, grads, strict=True))
        return [found.get(p) for p in self.targets.tensors]
