"""PCGrad: projecting conflicting gradients (Yu et al. 2020, "Gradient Surgery for Multi-Task Learning", Algorithm 1).

Task i starts from c = e_i and visits the other tasks j in a random order of its own. s = (c M)_j is the dot product
of its already modified gradient with the original g_j; where s < 0, c_j -= s / M_jj takes the conflict out.

The variants (Rhapsody on a Theme of Gradient Surgery, §3.3) visit one partner only, or take the mean over partners.
"""

import torch
from torch import Tensor

from gradkern.aggregators.base import Program, Solution
from gradkern.aggregators.projection import Order, Projection
from gradkern.cosines import cosines
from gradkern.ops import direct
from gradkern.ops.autograd import recording
from gradkern.ops.matrix import check_matrix

_pcgrad_matrix = torch.ops.gradkern.pcgrad.matrix

PARTNERS = ("all", "random", "average", "most_similar", "most_different")


class PCGrad(Projection):
    """PCGrad of Yu et al. 2020, on the device of the Gramian and without a wait for the host.

    Args:
        partner: whom a task's gradient is projected onto, where they conflict. "all" others, one after another, the
            paper's; "random", one other; "most_similar" and "most_different", the other with the largest or the
            smallest cosine, of equals the first; or "average", the mean over all others of the projections, each from
            the original gradient.
        order: None for the paper's fresh random order for each segment and task. Else integers: (T,), the partners
            in the order every task visits them, or (T, T), row i the order of task i. Each row is a permutation of
            0 … T-1; a task's own index in it is skipped. With ``partner="random"`` the first in it is the partner;
            the other three depend on no order and take none.
        reduction: "sum" of the T modified gradients, the paper's, or their "mean".
        generator: of the Gramian's device, draws the random orders; None for the device's default generator.
    """

    def __init__(
        self,
        partner: str = "all",
        order: Order | None = None,
        reduction: str = "sum",
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(partner, str) or partner not in PARTNERS:
            raise ValueError(f"partner must be one of {', '.join(map(repr, PARTNERS))}; got {partner!r}")
        if order is not None and partner not in ("all", "random"):
            raise ValueError(f"order must be None with partner={partner!r}, which depends on no order; got {order!r}")
        super().__init__(order, reduction, generator)
        self.partner = partner

    def forward(self, J: Tensor, offsets: Tensor | None = None) -> Tensor:
        """The update wᵀ J of a matrix of task gradients; see :meth:`Aggregator.forward`."""
        check_matrix(J, offsets)
        # In one call, where nobody has to see what lies between: a derivative, segments.
        if not self._takes_orders_alone() or offsets is not None or recording(J):
            return super().forward(J, offsets)
        T = J.shape[0]
        return _pcgrad_matrix(J, self._visiting_keys(1, T, J.device), self._visits(T), self.reduction == "mean")

    def program(self, M: Tensor) -> Program | None:
        """PCGrad's, where orders are all that it takes besides M; see :meth:`Aggregator.program`."""
        if not self._takes_orders_alone():
            return None
        S, T, _ = M.shape
        arguments = (self._visiting_keys(S, T, M.device), self._visits(T), self.reduction == "mean")
        return Program(direct.pcgrad_tensors, direct.pcgrad_masked, arguments, lambda _, w: Solution(w))

    def _takes_orders_alone(self) -> bool:
        """Not so of a subclass, which may have weights of its own."""
        return type(self) is PCGrad and self.partner in ("all", "random")

    def _solve(self, M: Tensor, present: Tensor | None) -> Tensor:
        if self.partner == "average":
            return _average(M)
        if self.partner in ("all", "random"):
            keys = self._visiting_keys(len(M), M.shape[-1], M.device)
        else:
            phi = cosines(M.double())
            keys = (phi if self.partner == "most_different" else -phi).nan_to_num(torch.inf, torch.inf, -torch.inf)
        return direct.pcgrad(M, keys, self._visits(M.shape[-1]))

    def _visits(self, T: int) -> int:
        return T - 1 if self.partner == "all" else min(1, T - 1)

    def __repr__(self) -> str:
        return f"PCGrad(partner={self.partner!r}, {self._repr_shared()})"


def _average(M: Tensor) -> Tensor:
    """c_j = -M_ij / M_jj / (T - 1) for every j in conflict with i, and c_i = 1."""
    wide = M.double()
    squares = wide.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    # A square may have vanished where a dot product has not.
    C = torch.where((wide < 0) & (squares > 0), -wide / squares, 0.0) / max(1, M.shape[-1] - 1)
    C.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return C.to(M.dtype)
