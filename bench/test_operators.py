"""``pytest bench``: each operator beside the plain PyTorch that does the same, and a copy of J as the limit."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import gradkern as gk

CONTESTANTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "gramian: gradkern": lambda J, W, out: gk.gramian(J),
    "gramian: J @ J.T": lambda J, W, out: J @ J.T,
    "combine: gradkern": lambda J, W, out: gk.combine(J, W[0]),
    "combine: w @ J": lambda J, W, out: W[0] @ J,
    "project: gradkern": lambda J, W, out: gk.project(J, W),
    "project: W @ J": lambda J, W, out: W @ J,
    "PCGrad: gradkern": lambda J, W, out: gk.PCGrad()(J),
    "copy": lambda J, W, out: out.copy_(J),
}


@pytest.mark.parametrize("name", CONTESTANTS)
@pytest.mark.parametrize(("T", "P"), [(3, 1_000_000), (8, 1_000_000)])
def test_operator(benchmark: Callable[..., Tensor], name: str, T: int, P: int) -> None:
    """One contestant; the groups put those of one shape together."""
    J = torch.randn(T, P)
    benchmark.group = f"T = {T}, P = {P:,}"  # type: ignore[attr-defined]
    benchmark(CONTESTANTS[name], J, torch.randn(T, T), torch.empty_like(J))
