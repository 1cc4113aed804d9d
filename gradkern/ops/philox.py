"""The random stream of suppression and of GradDrop: Philox4x32-10 (Salmon et al. 2011), evaluated on demand.

A counter-based generator has no state: the word of unit u at step s is a function of seed, s and u, which every back
end computes alike. Here int64 holds the 32-bit words, because PyTorch does not multiply unsigned ones on every device.
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

LARGEST_SEED = 2**64 - 1
WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
PIECE = 1 << 16
"""The number of units evaluated at a time: their four words of int64 each, 2 MB, stay in cache."""


def drawn_seed() -> int:
    """Return a seed from torch's default generator, a number even where FakeTensorMode gives tensors none."""
    with unset_fake_temporarily():
        return int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu"))


def signed(seed: int) -> int:
    """Return the int64 with the 64 bits of a seed."""
    return seed - 2**64 if seed >= 2**63 else seed


def dropped(first_unit: int, n_units: int, mask: Tensor) -> Tensor:
    """Return (n_units,) bool: whether each unit from ``first_unit`` on, a multiple of 4, is dropped.

    Args:
        mask: (3,) int64, on the device: seed, step and threshold, as for :class:`gradkern.ops.arguments.Mask`.
    """
    counters = torch.arange(first_unit // 4, first_unit // 4 + -(-n_units // 4), device=mask.device)
    drop = torch.empty((len(counters), 4), dtype=torch.bool, device=mask.device)
    for place, word in zip(drop.unbind(-1), _words(counters, *mask[:2].unbind()), strict=True):
        torch.lt(word, mask[2], out=place)
    return drop.view(-1)[:n_units]


def coins(first: int, n: int, stream: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (n,) numbers of [0, 1), those of the positions from ``first`` on, a multiple of 4.

    Args:
        stream: as for :class:`gradkern.ops.arguments.Coins`.
    """
    counters = torch.arange(first // 4, first // 4 + -(-n // 4), device=stream.device)
    numbers = torch.empty((len(counters), 4), dtype=dtype, device=stream.device)
    for place, word in zip(numbers.unbind(-1), _words(counters, *stream.unbind()), strict=True):
        place.copy_(word.bitwise_right_shift_(8))
    return numbers.mul_(2.0**-24).view(-1)[:n]


def dropped_at(units: Tensor, mask: Tensor) -> Tensor:
    """Return whether each of ``units``, int64, is dropped: bool of the same shape."""
    pieces = [_dropped_at(piece, mask) for piece in units.reshape(-1).split(PIECE)]
    return torch.cat(pieces).view(units.shape)


def _dropped_at(units: Tensor, mask: Tensor) -> Tensor:
    word = torch.stack(_words(units >> 2, *mask[:2].unbind()), -1).gather(-1, (units & 3).unsqueeze(-1)).squeeze(-1)
    return word < mask[2]


def _words(counters: Tensor, seed: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four 32-bit words at each counter."""
    like = torch.zeros_like(counters)
    c0, c1, c2, c3 = counters & WORD, counters >> 32 & WORD, like + (step & WORD), like + (step >> 32 & WORD)
    k0, k1 = seed & WORD, seed >> 32 & WORD
    p0, p1 = like, torch.empty_like(like)
    for _ in range(ROUNDS):
        # The products need 64 unsigned bits. In int64 they wrap to the same bits, and the masks remove the sign.
        torch.mul(c0, MULTIPLIERS[0], out=p0)
        torch.mul(c2, MULTIPLIERS[1], out=p1)
        # c0, c1, c2, c3 = high(p1) ^ c1 ^ k0, low(p1), high(p0) ^ c3 ^ k1, low(p0). The next mask removes the bits
        # above 32 of a low half. All is in place, because new memory would not be in the caches.
        torch.bitwise_right_shift(p1, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(WORD)
        torch.bitwise_right_shift(p0, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(WORD)
        c1, c3, p0, p1 = p1, p0, c3, c1
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1.bitwise_and_(WORD), c2, c3.bitwise_and_(WORD)
