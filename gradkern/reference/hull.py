"""MGDA (Désidéri 2012; Sener & Koltun 2018), by trying all supports of the weights."""

import math
from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from gradkern.reference.vectors import combine, length


def mgda(grads: Sequence[Tensor], normalize: str | None = None, losses: Sequence[float] | None = None) -> Tensor:
    """Return the shortest vector of the gradients' convex hull, found by trying every support: MGDA (Désidéri 2012).

    For some affinely independent gradients, the shortest vector of their affine hull lies inside their convex hull and
    is the answer.

    Args:
        grads: T vectors of P numbers; time grows as 2^T.
        normalize: what gradients are divided by while the weights are found: None, "l2" for their lengths, "loss" for
            their losses, "loss+" for both. The weights apply to the gradients as they are.
        losses: T numbers greater than 0, for "loss" and "loss+".
    """
    losses = [1.0] * len(grads) if losses is None else losses
    counting = [(g.double(), loss) for g, loss in zip(grads, losses, strict=True) if length(g) != 0]
    if not counting or not all(math.isfinite(length(g)) for g, _ in counting):
        return torch.stack([g.double() for g in grads]).sum(0) * 0
    rows = [g for g, _ in counting]
    lengths = [length(g) for g in rows]
    hull = [g / n for g, n in zip(rows, lengths, strict=True)] if normalize in ("l2", "loss+") else rows
    hull = [g / loss for g, (_, loss) in zip(hull, counting, strict=True)]
    best, update = math.inf, torch.zeros_like(rows[0])
    for size in range(1, len(rows) + 1):
        for support in combinations(range(len(rows)), size):
            first, *others = (hull[i] for i in support)
            w = torch.ones(size, dtype=torch.float64, device="cpu")
            if others:
                # Differences from the first gradient are scaled to length 1, so that long ones do not drown short ones.
                edges = torch.stack([g - first for g in others], 1)
                scale = edges.norm(dim=0)
                if (scale == 0).any():
                    continue
                w[1:] = torch.linalg.lstsq(edges / scale, -first, driver="gelsd").solution / scale
                w[0] = 1 - w[1:].sum()
            distance = length(torch.stack([hull[i] for i in support], 1) @ w)
            if (w >= 0).all() and distance < best:
                best, update = distance, combine([rows[i] for i in support], w.tolist())
    return update
