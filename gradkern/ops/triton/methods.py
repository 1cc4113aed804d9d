"""The T x T programs of the methods on the Triton back end."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from gradkern.kernels import gradvac as gradvac_kernel
from gradkern.kernels import pcgrad as pcgrad_kernel
from gradkern.ops import operators
from gradkern.ops.capture import ready
from gradkern.ops.layout import Tables
from gradkern.ops.partners import check_partner
from gradkern.ops.triton.backend import implements
from gradkern.ops.triton.checks import check_order_keys, check_targets


@implements(operators.pcgrad)
def pcgrad(M: Tensor, order_keys: Tensor | None, partner: str) -> Tensor:
    """Compute PCGrad's coefficients, (S, T, T)."""
    check_partner(order_keys, partner)
    if order_keys is not None:
        order_keys = check_order_keys(order_keys, M)
    C = torch.empty_like(M, memory_format=torch.contiguous_format)
    pcgrad_kernel.pcgrad(M.contiguous(), order_keys, partner, C).run(M.device)
    return C


@implements(operators.gradvac)
def gradvac(
    M: Tensor,
    order_keys: Tensor,
    targets: Tensor,
    update_mask: Tensor,
    beta: float,
    eps: Sequence[float] | None = None,
) -> Tensor:
    """Compute GradVac's coefficients, (S, T, T), and move the ``targets``."""
    order_keys = check_order_keys(order_keys, M)
    check_targets(targets, M)
    C = torch.empty_like(M, memory_format=torch.contiguous_format)
    state = gradvac_kernel.Targets(targets, update_mask.contiguous())
    table = None if eps is None else ready(_epsilons(tuple(eps)), M.device).on(M.device)
    gradvac_kernel.gradvac(M.contiguous(), order_keys, state, beta, table, C).run(M.device)
    return C


@dataclass(frozen=True, eq=False)
class _Epsilons(Tables):
    """The epsilons of segments whose rows are of several dtypes."""

    eps: tuple[float, ...]

    def on(self, device: torch.device) -> Tensor:
        """Return them on ``device``, (S,) float64, copied there once."""
        return self._once((device,), lambda: (np.array(self.eps),))[0]


_epsilons = lru_cache(maxsize=64)(_Epsilons)
