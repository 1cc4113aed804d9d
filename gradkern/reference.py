"""Every method written naively on explicit vectors, as its paper says. The tests compare the fast code with it.

Nothing here is fast, and no code is shared with the code that it checks. Arithmetic is float64.
"""

import math
from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from torch import Tensor


def gramian(grads: Sequence[Tensor]) -> Tensor:
    """Return all dot products of T vectors: (T, T) float64."""
    rows = [g.double() for g in grads]
    return torch.stack([torch.stack([(a * b).sum() for b in rows]) for a in rows])


def combine(grads: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return Σ w_i g_i: (P,) float64. A gradient of weight 0 is left out."""
    total = torch.zeros_like(grads[0], dtype=torch.float64)
    for g, w in zip(grads, weights, strict=True):
        if w != 0:
            total = total + w * g.double()
    return total


def project(grads: Sequence[Tensor], W: Sequence[Sequence[float]]) -> Tensor:
    """Return the rows Σ_i W_ri g_i, one for each r: (R, P) float64."""
    zero = torch.zeros_like(grads[0], dtype=torch.float64)
    return torch.stack([sum((w * g.double() for g, w in zip(grads, row, strict=True)), zero) for row in W])


def weighted_sum(grads: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Return the sum of the gradients, or their weighted sum: unitary scalarization (Kurin et al. 2022)."""
    return combine(grads, [1.0] * len(grads) if weights is None else weights)


def mean(grads: Sequence[Tensor]) -> Tensor:
    """Return the mean of the gradients."""
    return weighted_sum(grads) / len(grads)


def pcgrad(grads: Sequence[Tensor], order: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the T gradients as PCGrad modifies them (Yu et al. 2020, Algorithm 1). The update is their sum.

    Args:
        grads: T vectors of P numbers.
        order: for each task i, the tasks in the order in which it visits them; i itself is skipped.
    """
    originals = [g.double() for g in grads]
    modified = []
    for i, g in enumerate(originals):
        g_pc = g.clone()
        for j in order[i]:
            if j == i:
                continue
            dot = torch.dot(g_pc, originals[j])
            square = torch.dot(originals[j], originals[j])
            if dot < 0 and square > 0:
                g_pc = g_pc - dot / square * originals[j]
        modified.append(g_pc)
    return modified


def pcgrad_onto(grads: Sequence[Tensor], partners: Sequence[int | None]) -> list[Tensor]:
    """Project each gradient onto one partner if they conflict (Rhapsody on a Theme of Gradient Surgery, §3.3).

    A task whose partner is None keeps its gradient.
    """
    return pcgrad(grads, [[] if j is None else [j] for j in partners])


def most_similar(grads: Sequence[Tensor]) -> list[int | None]:
    """Return for each task its partner of largest cosine (Rhapsody, eq. 7); the first of equals, None of none."""
    return [max(partners(grads, i), key=lambda j: cosine(grads[i], grads[j]), default=None) for i in range(len(grads))]


def most_different(grads: Sequence[Tensor]) -> list[int | None]:
    """Return for each task its partner of smallest cosine (Rhapsody, eq. 8); the first of equals, None of none."""
    return [min(partners(grads, i), key=lambda j: cosine(grads[i], grads[j]), default=None) for i in range(len(grads))]


def partners(grads: Sequence[Tensor], i: int) -> list[int]:
    """Return the tasks that may be partners of task i: all others, except those whose gradient is zero."""
    return [j for j, g in enumerate(grads) if j != i and _length(g) != 0]


def pcgrad_average(grads: Sequence[Tensor]) -> list[Tensor]:
    """Return the mean over all partners of the projections, each from the original gradient (Rhapsody, eq. 6)."""
    modified = []
    for i, g in enumerate(grads):
        projected = [pcgrad([g, grads[j]], [[1], []])[0] for j in partners(grads, i)]
        modified.append(torch.stack(projected).mean(0) if projected else g.double())
    return modified


def pcgrad_of(partner: str, grads: Sequence[Tensor], order: Sequence[Sequence[int]]) -> list[Tensor]:
    """Run PCGrad with any partner. ``order`` is as for :func:`pcgrad`; "random" takes the first partner in it."""
    if partner == "average":
        return pcgrad_average(grads)
    if partner == "all":
        return pcgrad(grads, order)
    if partner == "random":
        first = [next((j for j in row if j in partners(grads, i)), None) for i, row in enumerate(order)]
        return pcgrad_onto(grads, first)
    return pcgrad_onto(grads, {"most_similar": most_similar, "most_different": most_different}[partner](grads))


def pcgrad_update(
    grads: Sequence[Tensor], order: Sequence[Sequence[int]] | None = None, partner: str = "all"
) -> Tensor:
    """Return the sum of PCGrad's modified gradients.

    ``order`` is as for :func:`pcgrad_of`. It may be None for partners that need no order.
    """
    return torch.stack(pcgrad_of(partner, grads, order or [[] for _ in grads])).sum(0)


def gradvac(
    grads: Sequence[Tensor], order: Sequence[Sequence[int]], targets: Tensor, beta: float, eps: float
) -> tuple[list[Tensor], Tensor]:
    """Return GradVac's modified gradients and its moved targets (Wang et al. 2021, Algorithm 1).

    Args:
        grads: T vectors of P numbers.
        order: as for :func:`pcgrad`.
        targets: (T, T), φ̂_ij.
        beta: how far a target moves toward the cosine.
        eps: a squared length of at most ``eps`` times the sum of its terms counts as zero, and a target stays at least
            ``eps`` away from -1 and 1.
    """
    originals = [g.double() for g in grads]
    J = torch.stack(originals)
    M = gramian(originals)
    moved = targets.double().clone()
    modified = []
    for i in range(len(grads)):
        c = torch.zeros(len(grads), dtype=torch.float64)
        c[i] = 1
        for j in order[i]:
            if j == i:
                continue
            g, g_j = c @ J, originals[j]
            terms = torch.outer(c, c).mul(M).abs().sum()
            n, n_j = _length(g), _length(g_j)
            if n * n <= eps * terms or n_j == 0 or not math.isfinite(n * n_j):
                continue
            phi = max(-1.0, min(1.0, float(torch.dot(g / n, g_j / n_j))))
            target = max(-1 + eps, min(1 - eps, float(moved[i, j])))
            if phi < target:
                a = n * (target * math.sqrt(1 - phi**2) - phi * math.sqrt(1 - target**2))
                c[j] += a / (n_j * math.sqrt(1 - target**2))
            moved[i, j] = (1 - beta) * moved[i, j] + beta * phi
        modified.append(c @ J)
    if not M.isfinite().all():
        moved = targets.double().clone()
    return modified, moved


def gradvac_updates(
    steps: Sequence[Sequence[Tensor]], order: Sequence[Sequence[int]], beta: float = 0.01
) -> list[Tensor]:
    """Return the updates of GradVac in several steps. Targets start from zero; ``order`` is as for :func:`pcgrad`."""
    targets = torch.zeros(len(steps[0]), len(steps[0]), dtype=torch.float64)
    updates = []
    for grads in steps:
        modified, targets = gradvac(grads, order, targets, beta, torch.finfo(torch.float64).eps)
        updates.append(torch.stack(modified).sum(0))
    return updates


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
    counting = [(g.double(), loss) for g, loss in zip(grads, losses, strict=True) if _length(g) != 0]
    if not counting or not all(math.isfinite(_length(g)) for g, _ in counting):
        return torch.stack([g.double() for g in grads]).sum(0) * 0
    rows = [g for g, _ in counting]
    lengths = [_length(g) for g in rows]
    hull = [g / n for g, n in zip(rows, lengths, strict=True)] if normalize in ("l2", "loss+") else rows
    hull = [g / loss for g, (_, loss) in zip(hull, counting, strict=True)]
    best, update = math.inf, torch.zeros_like(rows[0])
    for size in range(1, len(rows) + 1):
        for support in combinations(range(len(rows)), size):
            first, *others = (hull[i] for i in support)
            w = torch.ones(size, dtype=torch.float64)
            if others:
                # Differences from the first gradient are scaled to length 1, so that long ones do not drown short ones.
                edges = torch.stack([g - first for g in others], 1)
                scale = edges.norm(dim=0)
                if (scale == 0).any():
                    continue
                w[1:] = torch.linalg.lstsq(edges / scale, -first, driver="gelsd").solution / scale
                w[0] = 1 - w[1:].sum()
            length = _length(torch.stack([hull[i] for i in support], 1) @ w)
            if (w >= 0).all() and length < best:
                best, update = length, combine([rows[i] for i in support], w.tolist())
    return update


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of two vectors; 0 where either is zero."""
    n_a, n_b = _length(a), _length(b)
    return 0.0 if n_a == 0 or n_b == 0 else float(torch.dot(a.double() / n_a, b.double() / n_b))


def step_scale(grads: Sequence[Tensor], mode: str, reduce: str) -> float:
    """Return the factor κ that scales the step (Rhapsody, §3.4): 1 + φ to attenuate conflict, 1 - φ to amplify it."""
    nonzero = [g for g in grads if _length(g) != 0]
    phis = [cosine(a, b) for i, a in enumerate(nonzero) for b in nonzero[i + 1 :]]
    if not phis or not all(math.isfinite(phi) for phi in phis):
        return 1.0
    phi = min(phis) if reduce == "min" else sum(phis) / len(phis)
    return 1 + phi if mode == "attenuate" else 1 - phi


def philox(seed: int, step: int, counters: Tensor) -> Tensor:
    """Return the words of Philox4x32-10 (Salmon et al. 2011): (n, 4) int64.

    The 128-bit counters are (counter, step), and the key is the seed.

    Args:
        seed, step: 64-bit unsigned.
        counters: (n,) int64.
    """
    word = 2**32 - 1

    def product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return the high and the low word of a 64-bit product. int64 cannot hold it, so two of 48 bits make it."""
        low, high = (a & 0xFFFF) * b, (a >> 16) * b
        return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & word

    c0, c1 = counters & word, (counters >> 32) & word
    c2, c3 = torch.full_like(counters, step & word), torch.full_like(counters, step >> 32)
    k0, k1 = seed & word, seed >> 32
    for _ in range(10):
        (high0, low0), (high1, low1) = product(0xD2511F53, c0), product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    return torch.stack((c0, c1, c2, c3), 1)


def kept(seed: int, step: int, p: float, block: int, first_unit: int, numel: int) -> Tensor:
    """Return True for the entries of a parameter gradient that suppression keeps (Rhapsody, §3.5): (numel,) bool.

    Entry e belongs to unit ``first_unit + e // block``. Unit u is dropped if word u mod 4 at counter u div 4 is below
    p 2³².
    """
    units = first_unit + torch.arange(numel) // block
    words = philox(seed, step, units // 4)
    return words[torch.arange(numel), units % 4] >= round(p * 2**32)


def first_units(numels: Sequence[int], block: int) -> list[int]:
    """Return the first unit of each parameter. It has ⌈numel / block⌉ units and starts at a multiple of 4."""
    firsts, unit = [], 0
    for numel in numels:
        firsts.append(unit)
        unit += -(-numel // block)
        unit += -unit % 4
    return firsts


def suppressed(
    grads: Sequence[Tensor], keep: Tensor, scope: str, method: Callable[[Sequence[Tensor]], list[Tensor]]
) -> Tensor:
    """Return b ⊙ Σ_i g_i′ (Rhapsody, eq. 11), where ``method`` gives the modified gradients g_i′.

    Args:
        keep: (P,) bool, the mask b.
        scope: "all" to let ``method`` see the kept entries only.
    """
    zero = torch.zeros((), dtype=torch.float64)
    rows = [torch.where(keep, g.double(), zero) for g in grads] if scope == "all" else [g.double() for g in grads]
    return torch.where(keep, torch.stack(method(rows)).sum(0), zero)


def attention_optimum(grads: Sequence[Tensor], entropy: float) -> Tensor:
    """Return softmax(r / τ), r_i = Σ_j φ_ij: the maximum of GradAttention's objective Σ_i α_i r_i + τ H(α)."""
    r = torch.tensor([sum(cosine(a, b) for b in grads) for a in grads], dtype=torch.float64)
    return torch.softmax(r / entropy, 0)


def gradattention_updates(steps: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return the first update of GradAttention, whose network starts from equal weights; later ones need training."""
    return [mean(steps[0])]


def adamw(
    p: Tensor,
    moments: Sequence[Tensor],
    g: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float,
) -> list[Tensor]:
    """Take a step of AdamW (Loshchilov & Hutter 2019, Algorithm 2) and return the new p, m and v.

    Args:
        moments: m and v. A third one, the largest v so far, turns on amsgrad (Reddi et al. 2018) and is returned too.
        step: the number of the step; the first is 1.
    """
    p, m, v, *largest = (x.double() for x in (p, *moments))
    m = betas[0] * m + (1 - betas[0]) * g.double()
    v = betas[1] * v + (1 - betas[1]) * g.double() ** 2
    largest = [torch.maximum(u, v) for u in largest]
    m_hat = m / (1 - betas[0] ** step)
    v_hat = (largest[0] if largest else v) / (1 - betas[1] ** step)
    return [p - lr * weight_decay * p - lr * m_hat / (v_hat.sqrt() + eps), m, v, *largest]


class Memory:
    """Runs steps with some of the tasks, and keeps the last gradients of the others as vectors (Rhapsody, §3.2)."""

    def __init__(self, n_tasks: int, n_entries: int) -> None:
        self.rows = [torch.zeros(n_entries, dtype=torch.float64) for _ in range(n_tasks)]

    def step(self, present: dict[int, Tensor], method: Callable[[Sequence[Tensor]], list[Tensor]]) -> Tensor:
        """Return the sum of the present tasks' modified gradients. ``method`` modifies remembered gradients too."""
        for i, g in present.items():
            self.rows[i] = g.double()
        modified = method(self.rows)
        return torch.stack([modified[i] for i in present]).sum(0)


def _length(g: Tensor) -> float:
    return float(g.double().norm())
