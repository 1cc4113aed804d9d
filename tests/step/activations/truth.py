"""A step computed from whole rows: torch's own gradients of each loss, their dot products in float64, and one sum."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import gradkern as gk
from gradkern.info import SurgeryInfo
from tests.tolerances import assert_near

FINISHES = ["backward", "kept"]
NEAR = 1e-12
"""Of float64, relative to the largest term. Sums over a hundred tokens in another order differ by some 1e-15."""


class Mixed(gk.Aggregator):
    """A method whose weights are all different, and depend smoothly on each entry of the Gramian."""

    def weights(self, M: Tensor) -> Tensor:
        T = M.shape[-1]
        numbers = torch.arange(1, T + 1, dtype=M.dtype)
        share = M / (1 + M.diagonal(dim1=-2, dim2=-1).sum(-1))[..., None, None]
        return 0.3 * numbers + share @ numbers.flip(0).cos()


@dataclass(frozen=True)
class Truth:
    """A step's Gramian (T, T), weights (T,), gradients, and the largest entry of any term of them."""

    gramian: Tensor
    weights: Tensor
    grads: list[Tensor | None]
    scale: float


def truth(losses: Sequence[Tensor | None], params: Sequence[Tensor], weigh: Callable[[Tensor], Tensor]) -> Truth:
    """Return what a step has to give. The graphs are kept.

    A parameter that two losses reach gets the weighted sum of its rows, and any other the plain sum.
    """
    rows = [_row(loss, params) for loss in losses]
    columns = [[row[k] for row in rows] for k in range(len(params))]
    shared = [sum(g is not None for g in column) >= 2 for column in columns]
    zeros = [torch.zeros_like(real(p.detach())) for p in params]
    J = torch.stack(
        [
            torch.cat([torch.zeros(0), *(zeros[k] if g is None else g for k, g in enumerate(row) if shared[k])])
            for row in rows
        ]
    )
    M = J @ J.T
    w = weigh(M)
    assert w.shape == (len(losses),)
    terms = [
        [(float(w[t]) if shared[k] else 1.0) * g for t, g in enumerate(column) if g is not None]
        for k, column in enumerate(columns)
    ]
    scale = max((float(term.abs().max()) for column in terms for term in column if term.numel()), default=0.0)
    return Truth(M, w, [sum(column[1:], column[0]) if column else None for column in terms], scale)


def real(g: Tensor) -> Tensor:
    """Return a gradient's numbers, float64 and one after another; complex ones are pairs."""
    g = (g.to_dense() if g.layout is not torch.strided else g).detach()
    return (torch.view_as_real(g.resolve_conj()) if g.is_complex() else g).reshape(-1).double()


def check_step(
    losses: Sequence[Tensor | None],
    params: Sequence[Tensor],
    finish: str,
    tolerance: float = NEAR,
    make: Callable[[], gk.Aggregator] = Mixed,
    retain_graph: bool = False,
) -> SurgeryInfo:
    """Assert that a step through activations is the one computed from whole rows, and return what it returned.

    Parameters that require grad and have ``.grad`` None are expected among ``params``. Others get nothing.
    """
    trained = [p for p in params if p.requires_grad]
    expected = truth(losses, trained, make().weights)
    info = gk.backward(
        losses, params, aggregator=make(), through="activations", finish=finish, retain_graph=retain_graph
    )
    assert_near(info.gramian, expected.gramian, expected.gramian.diagonal().max(), tolerance)
    check_grads(trained, expected, tolerance)
    assert all(p.grad is None for p in params if not p.requires_grad)
    return info


def check_grads(params: Sequence[Tensor], expected: Truth, tolerance: float = NEAR) -> None:
    """Assert that each ``.grad`` is as expected."""
    for p, g in zip(params, expected.grads, strict=True):
        assert (p.grad is None) == (g is None), f"{'no' if p.grad is None else 'a'} .grad of shape {tuple(p.shape)}"
        if g is not None:
            assert p.grad.dtype == p.dtype
            assert p.grad.shape == p.shape
            assert not p.grad.requires_grad
            assert_near(real(p.grad), g, expected.scale, tolerance)


def _row(loss: Tensor | None, params: Sequence[Tensor]) -> list[Tensor | None]:
    if loss is None:
        return [None] * len(params)
    grads = torch.autograd.grad(loss, list(params), retain_graph=True, allow_unused=True)
    return [None if g is None else real(g) for g in grads]
