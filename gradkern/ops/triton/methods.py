"""The T x T programs of the methods on the Triton back end."""

import torch
from torch import Tensor

from gradkern.kernels import gradvac as gradvac_kernel
from gradkern.kernels import pcgrad as pcgrad_kernel
from gradkern.ops import operators
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
def gradvac(M: Tensor, order_keys: Tensor, targets: Tensor, update_mask: Tensor, beta: float) -> Tensor:
    """Compute GradVac's coefficients, (S, T, T), and move the ``targets``."""
    order_keys = check_order_keys(order_keys, M)
    check_targets(targets, M)
    C = torch.empty_like(M, memory_format=torch.contiguous_format)
    gradvac_kernel.gradvac(M.contiguous(), order_keys, targets, update_mask.contiguous(), beta, C).run(M.device)
    return C
