"""Checks of T x T arguments. The kernels do not check shapes."""

import torch
from torch import Tensor


def check_order_keys(order_keys: Tensor, M: Tensor) -> Tensor:
    """Return ``order_keys`` contiguous; raise ValueError unless they fit M's segments, or one segment for all."""
    _check("order_keys", order_keys, M, (1, M.shape[0]))
    return order_keys.contiguous()


def check_targets(targets: Tensor, M: Tensor) -> None:
    """Raise ValueError unless ``targets`` fit M's segments and the kernel can move them in place."""
    _check("targets", targets, M, (M.shape[0],))
    if targets.dtype != torch.float64 or not targets.is_contiguous():
        raise ValueError(f"targets must be contiguous float64, got {targets.dtype}, strides {targets.stride()}")


def _check(name: str, given: Tensor, M: Tensor, sizes: tuple[int, ...]) -> None:
    """Raise ValueError unless ``given`` has M's shape, with one of ``sizes`` segments."""
    if given.shape[1:] != M.shape[1:] or given.shape[0] not in sizes:
        shapes = " or ".join(str((size, *M.shape[1:])) for size in dict.fromkeys(reversed(sizes)))
        raise ValueError(f"{name} must be {shapes}, got {tuple(given.shape)}")
