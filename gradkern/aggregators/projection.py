"""The base class of PCGrad and GradVac: each task visits partners in some order, which modify its gradient."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from gradkern.aggregators.base import Aggregator, PerDevice, Solution, check_gramian
from gradkern.arguments import choice, entries, integer, sequence, shown

Order = Sequence[int] | Sequence[Sequence[int]] | Tensor


class Projection(Aggregator):
    """A method that computes a modified gradient for each task, a combination of the original gradients.

    Args:
        order: None for a fresh random order for each segment and task. Otherwise integers: (T,), the order in which
            every task visits its partners, or (T, T), where row i is the order of task i. Each row is a permutation
            of 0 … T-1, in which a task skips its own index.
        reduction: "sum" of the T modified gradients, or their "mean".
        generator: a generator on the Gramian's device that draws the random orders; None for the device's default one.
    """

    def __init__(self, order: Order | None, reduction: str, generator: torch.Generator | None) -> None:
        super().__init__(generator)
        self.reduction = choice("reduction", reduction, ("sum", "mean"))
        self.order = None if order is None else _checked(order)
        # The key of task i for partner j is the position of j in the order of i.
        self._keys = None if self.order is None else PerDevice(self.order.argsort(-1).tolist())

    def coefficients(self, M: Tensor) -> Tensor:
        """Return the modified gradients as combinations of the original ones: row i of the result belongs to task i.

        Args:
            M: (..., T, T), Gramians; float32 or float64.

        Returns:
            (..., T, T), of M's dtype.
        """
        return self._modified(M, None)

    def weights(self, M: Tensor) -> Tensor:
        """Return the sum (or mean) of the coefficients over tasks; see :meth:`Aggregator.weights`."""
        return self._reduced(self._modified(M, None))

    def solution(self, M: Tensor, present: Tensor | None, losses: Tensor | None = None) -> Solution:
        """Return the sum (or mean) of the present tasks' coefficients; see :meth:`Aggregator.solution`."""
        C = self._modified(M, present)
        return Solution(self._reduced(C if present is None else torch.where(present.unsqueeze(-1), C, 0.0)))

    def _modified(self, M: Tensor, present: Tensor | None) -> Tensor:
        check_gramian(M)
        T = M.shape[-1]
        return self._solve(M.detach().reshape(-1, T, T), present).view_as(M)

    @abstractmethod
    def _solve(self, M: Tensor, present: Tensor | None) -> Tensor:
        """Return :meth:`coefficients` of M (S, T, T). ``present`` is as for :meth:`Aggregator.solution`."""

    def _reduced(self, C: Tensor) -> Tensor:
        return C.sum(-2) if self.reduction == "sum" else C.mean(-2)

    def _order_keys(self, S: int, T: int, device: torch.device) -> Tensor:
        """Return order keys (S or 1, T, T): task i visits its partners in ascending order of row i."""
        if self._keys is None:
            if self.generator is not None and self.generator.device != device:
                raise ValueError(f"generator is on {self.generator.device}, M on {device}")
            return torch.rand(S, T, T, generator=self.generator, dtype=torch.float32, device=device)
        n_tasks = len(self._keys.values)
        if n_tasks != T:
            raise ValueError(f"order is for {n_tasks} tasks, M has {T}: {self.order}")
        return self._keys.on(device, torch.float32).expand(1, T, T).contiguous()

    def _repr_shared(self) -> str:
        order = None if self.order is None else self.order.tolist()
        generator = "" if self.generator is None else f", generator={self.generator!r}"
        return f"order={order}, reduction={self.reduction!r}{generator}"


def _checked(order: Order) -> Tensor:
    """Return ``order`` as a tensor, (T,) or (T, T), if it holds permutations of 0 … T-1."""
    given = entries("order", order, "integers, (T,) or (T, T)")
    per_task = any(isinstance(row, Sequence) for row in given)
    rows = [
        [integer(f"order[{i}]", entry) for entry in sequence(f"order[{i}]", row, "a row of integers")]
        for i, row in enumerate(given if per_task else [given])
    ]
    lengths = {len(row) for row in rows}
    if lengths == {0} or (per_task and lengths != {len(rows)}):
        raise ValueError(f"order must have shape (T,) or (T, T) with T >= 1, got {shown(order)}")
    in_order = list(range(len(rows[0])))
    if any(sorted(row) != in_order for row in rows):
        raise ValueError(f"order must be a permutation of 0 … {in_order[-1]} in every row, got {shown(order)}")
    return torch.tensor(rows if per_task else rows[0], device="cpu")
