"""The learning rate by conflict (Rhapsody on a Theme of Gradient Surgery, §3.4): how far a step goes.

The step is scaled and not the gradient, whose scale Adam and its relatives divide out again:

    θ ← θ_before + κ (θ_after - θ_before)       around the step of any optimizer

which is its step with lr κ, decoupled weight decay included. κ stays on the device.
"""

import torch
from torch import Tensor

from gradkern.ops.cosines import cosines

MODES = ("attenuate", "amplify")
REDUCTIONS = ("mean", "min")


class ConflictLR:
    """Scale each step by κ = 1 + φ or 1 - φ, φ the cosine of the tasks' gradients over all shared parameters.

    Of these it takes the entries that the method's dot products take: all, but for ``Suppression(scope="all")`` and
    ``GradAttention(update="subset")``.

    Args:
        mode: "attenuate", κ = 1 + φ, takes smaller steps under conflict; "amplify", κ = 1 - φ, larger ones.
        reduce: what φ is with more than two tasks: the "mean" over the pairs of tasks whose gradients are not zero, or
            the "min".
    """

    def __init__(self, mode: str = "attenuate", reduce: str = "mean") -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be 'attenuate' or 'amplify', got {mode!r}")
        if reduce not in REDUCTIONS:
            raise ValueError(f"reduce must be 'mean' or 'min', got {reduce!r}")
        self.mode = mode
        self.reduce = reduce

    def scale(self, M: Tensor) -> Tensor:
        """κ of the whole model's Gramian.

        Args:
            M: (T, T), float32 or float64.

        Returns:
            (), of M's dtype and on its device; 1 where there is no pair of gradients that are not zero, or a dot
            product is not finite.
        """
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


@torch.no_grad()
def rescale(params: list[Tensor], before: list[Tensor], kappa: Tensor) -> None:
    """Leave ``params``, which an optimizer has moved from ``before``, κ of the way; ``before`` is overwritten.

    As θ_after + (1 - κ) (θ_before - θ_after): the difference of neighbouring numbers rounds nothing, and at κ = 1 the
    step is the optimizer's to the last bit.
    """
    torch._foreach_sub_(before, params)
    torch._foreach_mul_(before, 1 - kappa)
    torch._foreach_add_(params, before)
