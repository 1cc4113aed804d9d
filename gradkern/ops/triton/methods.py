"""The T x T programs of the methods on CUDA and ROCm tensors."""

import torch
from torch import Tensor

from gradkern.kernels import gradvac as gradvac_kernel
from gradkern.kernels import pcgrad as pcgrad_kernel
from gradkern.ops.partners import check_partner


def pcgrad(M: Tensor, keys: Tensor | None, partner: str) -> Tensor:
    """Coefficients of PCGrad's projected gradients, (S, T, T)."""
    check_partner(keys, partner)
    if keys is not None:
        keys = keys_of(keys, M)
    C = torch.empty_like(M, memory_format=torch.contiguous_format)
    pcgrad_kernel.pcgrad(M.contiguous(), keys, partner, C).run(M.device)
    return C


def gradvac(M: Tensor, keys: Tensor, targets: Tensor, moving: Tensor, beta: float) -> Tensor:
    """Coefficients of GradVac's modified gradients, (S, T, T); the ``targets`` of the ``moving`` tasks follow."""
    keys = keys_of(keys, M)
    check_targets(targets, M)
    C = torch.empty_like(M, memory_format=torch.contiguous_format)
    gradvac_kernel.gradvac(M.contiguous(), keys, targets, moving.contiguous(), beta, C).run(M.device)
    return C


def keys_of(keys: Tensor, M: Tensor) -> Tensor:
    """``keys`` as the kernels take them; raise unless they are of M's segments or of one for all."""
    _check("keys", keys, M, (1, M.shape[0]))
    return keys.contiguous()


def check_targets(targets: Tensor, M: Tensor) -> None:
    """Raise unless ``targets`` are of M's segments, and as the kernel moves them."""
    _check("targets", targets, M, (M.shape[0],))
    if targets.dtype != torch.float64 or not targets.is_contiguous():
        raise ValueError(f"targets must be contiguous float64, got {targets.dtype}, strides {targets.stride()}")


def _check(name: str, given: Tensor, M: Tensor, sizes: tuple[int, ...]) -> None:
    """Raise unless ``given`` has M's shape, one of ``sizes`` in place of the number of segments."""
    if given.shape[1:] != M.shape[1:] or given.shape[0] not in sizes:
        shapes = " or ".join(str((size, *M.shape[1:])) for size in dict.fromkeys(reversed(sizes)))
        raise ValueError(f"{name} must be {shapes}, got {tuple(given.shape)}")
