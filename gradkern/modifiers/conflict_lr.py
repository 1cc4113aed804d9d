"""The learning rate by conflict (Rhapsody on a Theme of Gradient Surgery, §3.4) scales the length of a step.

It scales the step and not the gradient, because Adam and its relatives divide out the gradient's scale:

    θ ← θ_before + κ (θ_after - θ_before)       around the step of any optimizer

This equals the optimizer's step with learning rate lr κ, including decoupled weight decay. κ stays on the device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gradkern.aggregators.base import check_gramian
from gradkern.arguments import choice
from gradkern.ops.cosines import cosines

MODES = ("attenuate", "amplify")
REDUCTIONS = ("mean", "min")


class ConflictLR:
    """Scales each step by κ = 1 + φ or 1 - φ, where φ is the cosine of the task gradients over all shared parameters.

    φ takes the same entries as the method's dot products: all entries, except with ``Suppression(scope="all")`` and
    with ``GradAttention(update="subset")``.

    Args:
        mode: "attenuate" takes smaller steps under conflict, κ = 1 + φ; "amplify" takes larger steps, κ = 1 - φ.
        reduce: the reduction to φ of the cosines of more than two tasks: the "mean" over the pairs of tasks whose
            gradients are not zero, or the "min".
    """

    def __init__(self, mode: str = "attenuate", reduce: str = "mean") -> None:
        self.mode = choice("mode", mode, MODES)
        self.reduce = choice("reduce", reduce, REDUCTIONS)

    def scale(self, M: Tensor) -> Tensor:
        """Return κ of the whole model's Gramian.

        Args:
            M: (T, T), float32 or float64.

        Returns:
            (), of M's dtype and on its device; 1 if no two gradients are nonzero, or if a dot product is not
            finite.

        Raises:
            TypeError, ValueError: ``M`` is not a Gramian.
        """
        check_gramian(M)
        nonzero = M.diagonal() != 0
        pairs = (nonzero.unsqueeze(-1) & nonzero).triu(1)
        phi = cosines(M.double())
        if self.reduce == "min":
            phi = torch.where(pairs, phi, torch.inf).min()
        else:
            phi = torch.where(pairs, phi, 0.0).sum() / pairs.sum()
        kappa = 1 + phi if self.mode == "attenuate" else 1 - phi
        return torch.where(kappa.isfinite() & M.isfinite().all(), kappa, 1.0).to(M.dtype)

    def __repr__(self) -> str:
        return f"ConflictLR(mode={self.mode!r}, reduce={self.reduce!r})"


@contextmanager
def rescaled(params: list[Tensor], pending: Any) -> Iterator[None]:
    """Scale by κ, once, the step that an optimizer takes within the block, unless that raises.

    It computes θ_after + (1 - κ) (θ_before - θ_after): the difference of nearby numbers is exact, and with κ = 1 the
    step is the optimizer's to the last bit.

    Args:
        params: the parameters.
        pending: holds κ as ``step_scale``; a step clears it. None for no κ.
    """
    before = [torch.empty_like(p) for p in params]
    torch._foreach_copy_(before, [p.detach() for p in params])
    yield
    if pending.step_scale is None:
        return
    with torch.no_grad():
        torch._foreach_sub_(before, params)
        torch._foreach_mul_(before, 1 - pending.step_scale)
        torch._foreach_add_(params, before)
    pending.step_scale = None
