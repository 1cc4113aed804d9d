"""The methods that combine task gradients entry by entry (Chen et al. 2020; Yin et al. 2018)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkern.reference.suppression import philox


def graddrop_coins(seed: int, step: int, positions: Tensor) -> Tensor:
    """Return the random number of each position, (n,) float64 in [0, 1).

    It is the 24 leading bits of word e mod 4 of Philox at counter e div 4, with the top bit of the step set.

    Args:
        seed, step: the key, and the number of the step from 0.
        positions: (n,) int64.
    """
    words = philox(seed, 2**63 + step, positions // 4)
    word = words[torch.arange(len(positions), device="cpu"), positions % 4]
    return (word >> 8).double() / 2**24


def chosen_signs(grads: Sequence[Tensor], coins: Tensor) -> Tensor:
    """Return whether GradDrop keeps the positive gradients of each entry, (P,) bool.

    Positive ones are kept if the coin is below p = P / (P + N), P the sum of the positive gradients and N that of the
    negative ones' absolute values, which is ½ (1 + Σ g / Σ |g|) (Chen et al. 2020). The last bit counts, so P and N are
    added up in the precision in which rows of this dtype are computed: float64 in itself, all others in float32.
    """
    dtype = torch.float64 if grads[0].dtype == torch.float64 else torch.float32
    positive = negative = torch.zeros(grads[0].shape, dtype=dtype, device="cpu")
    for g in grads:
        positive = positive + g.to(dtype).clamp(min=0)
        negative = negative + (-g.to(dtype)).clamp(min=0)
    return coins.to(dtype) * (positive + negative) < positive


def graddrop(
    grads: Sequence[Tensor],
    leak: float | Sequence[float] = 0.0,
    seed: int = 0,
    step: int = 0,
    positions: Tensor | None = None,
    present: Sequence[bool] | None = None,
) -> Tensor:
    """Return the sum of the gradients of one sign at each entry, and of a share of the others: (P,) float64.

    Args:
        grads: T vectors of P numbers.
        leak: the share of each task's gradients that passes where its sign is not kept.
        seed, step: the position in the random stream.
        positions: (P,) int64, the entries' positions in the stream; None for 0 to P - 1.
        present: whether each task's gradients are added; the others only decide on signs.
    """
    T, P = len(grads), len(grads[0])
    positions = torch.arange(P, device="cpu") if positions is None else positions
    leaks = [float(leak)] * T if isinstance(leak, (int, float)) else list(leak)
    keep_positive = chosen_signs(grads, graddrop_coins(seed, step, positions))
    update = torch.zeros(P, dtype=torch.float64, device="cpu")
    for t, (g, share) in enumerate(zip(grads, leaks, strict=True)):
        kept = torch.where(keep_positive, g > 0, g < 0)
        if present is None or present[t]:
            update += torch.where(kept, g.double(), share * g.double())
    return update


def graddrop_updates(
    steps: Sequence[Sequence[Tensor]], leak: float | Sequence[float] = 0.0, seed: int = 0
) -> list[Tensor]:
    """Return GradDrop's updates of consecutive steps."""
    return [graddrop(grads, leak, seed, step) for step, grads in enumerate(steps)]


def trimmed_mean(grads: Sequence[Tensor], k: int, present: Sequence[bool] | None = None) -> Tensor:
    """Return the mean of each entry's gradients without the k largest and the k smallest: (P,) float64.

    Args:
        grads: T vectors of P numbers.
        k: the number of gradients left out at each end.
        present: whether each task's gradients are added up; the others only take part in the choice.
    """
    T = len(grads)
    entries = torch.stack([g.double() for g in grads])
    order = entries.argsort(dim=0, descending=True, stable=True)[k : T - k]  # the earlier of equals is larger
    left = entries.gather(0, order)
    if present is not None:
        left = left * torch.tensor(present, dtype=torch.float64, device="cpu")[order]
    return left.sum(0) / (T - 2 * k)
