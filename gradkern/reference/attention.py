"""GradAttention: what is known in closed form."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkern.reference.fixed import mean
from gradkern.reference.vectors import cosine


def attention_optimum(grads: Sequence[Tensor], entropy: float) -> Tensor:
    """Return softmax(r / τ), r_i = Σ_j φ_ij: the maximum of GradAttention's objective Σ_i α_i r_i + τ H(α)."""
    r = torch.tensor([sum(cosine(a, b) for b in grads) for a in grads], dtype=torch.float64, device="cpu")
    return torch.softmax(r / entropy, 0)


def gradattention_updates(steps: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return the first update of GradAttention, whose network starts from equal weights; later ones need training."""
    return [mean(steps[0])]
