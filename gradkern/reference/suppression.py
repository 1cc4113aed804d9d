"""Gradient suppression (Rhapsody, §3.5), with the random numbers of Philox."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


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
    entries = torch.arange(numel, device="cpu")
    units = first_unit + entries // block
    words = philox(seed, step, units // 4)
    return words[entries, units % 4] >= round(p * 2**32)


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
    zero = torch.zeros((), dtype=torch.float64, device="cpu")
    rows = [torch.where(keep, g.double(), zero) for g in grads] if scope == "all" else [g.double() for g in grads]
    return torch.where(keep, torch.stack(method(rows)).sum(0), zero)
