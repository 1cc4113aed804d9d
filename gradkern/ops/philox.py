"""The random stream of gradient suppression: Philox4x32-10 (Salmon et al. 2011), evaluated where it is asked for.

A generator that counts has no state to carry: the word of unit u at step s is a function of seed, s and u, which every
back end computes alike. int64 holds the 32-bit words here, for PyTorch multiplies no unsigned ones on every device.
"""

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
PIECE = 1 << 16
"""Units looked up at a time: four words each of int64, 2 MB, stay in cache."""


def dropped(first_unit: int, n_units: int, mask: Tensor) -> Tensor:
    """(n_units,) bool, which of the units from ``first_unit``, a multiple of 4, on are dropped.

    Args:
        mask: (3,) int64, on the device: seed, step and threshold, as ``ops/schema.py`` says.
    """
    counters = torch.arange(first_unit // 4, first_unit // 4 + -(-n_units // 4), device=mask.device)
    return (torch.stack(_words(counters, mask), -1) < mask[2]).view(-1)[:n_units]


def dropped_at(units: Tensor, mask: Tensor) -> Tensor:
    """Which of ``units``, any int64, are dropped: bool of their shape."""
    pieces = [_dropped_at(piece, mask) for piece in units.reshape(-1).split(PIECE)]
    return torch.cat(pieces).view(units.shape)


def _dropped_at(units: Tensor, mask: Tensor) -> Tensor:
    word = torch.stack(_words(units >> 2, mask), -1).gather(-1, (units & 3).unsqueeze(-1)).squeeze(-1)
    return word < mask[2]


def _words(counters: Tensor, mask: Tensor) -> list[Tensor]:
    """The four 32-bit words at each counter. What all have in common stays one number as long as it is."""
    seed, step, _ = mask.unbind()
    c = [counters & WORD, counters >> 32 & WORD, step & WORD, step >> 32 & WORD]
    k = [seed & WORD, seed >> 32 & WORD]
    for _ in range(ROUNDS):
        # The products take 64 bits without a sign. In int64 they wrap to the same bits, and the masks drop the sign.
        p0, p1 = MULTIPLIERS[0] * c[0], MULTIPLIERS[1] * c[2]
        c = [(p1 >> 32 & WORD) ^ c[1] ^ k[0], p1 & WORD, (p0 >> 32 & WORD) ^ c[3] ^ k[1], p0 & WORD]
        k = [(k[0] + WEYL[0]) & WORD, (k[1] + WEYL[1]) & WORD]
    return list(torch.broadcast_tensors(*c))
