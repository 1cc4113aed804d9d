"""GradDrop (Chen et al. 2020): at each entry the gradients of one sign are kept, at random."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkern.aggregators.base import PerDevice, has_numbers
from gradkern.aggregators.entries.entrywise import Entries, Entrywise
from gradkern.arguments import integer, number, numbers
from gradkern.ops import operators
from gradkern.ops.arguments import Coins, sample
from gradkern.ops.dtypes import arithmetic_dtype
from gradkern.ops.philox import LARGEST_SEED, drawn_seed, signed

_OWN_STREAM = -(2**63)
"""The top bit of the step's 64 bits, which is set here and not in suppression: with equal seeds both draw apart."""


class GradDrop(Entrywise):
    """GradDrop of Chen et al. 2020, "Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout".

    At each entry let p = ½ (1 + Σ g_i / Σ |g_i|). With probability p the update there is the sum of the positive
    gradients, else that of the negative ones. Seed, step and position decide, by Philox4x32-10 as in
    :class:`gradkern.Suppression`, so that no mask is stored and a resumed run continues with the same choices. Each
    parameter under surgery begins at a multiple of 4 in the stream, in the order of the parameters.

    A gradient that is not finite makes its entry NaN, so that gradient scalers see it. Every step moves to the next
    numbers, also one that is not finite; a step that raises does not.

    As TorchJD's GradDrop with ``f`` the identity. There the numbers are torch's, and an entry where all gradients are
    zero is NaN.

    Args:
        leak: the share of a gradient that passes where its sign is not chosen, from 0 to 1; or T shares, one per task.
        seed: from 0 to 2⁶⁴ - 1; None to draw one from torch's default generator.
    """

    looks_at_positions = True
    _stream: Tensor

    def __init__(self, leak: float | Sequence[float] | Tensor = 0.0, seed: int | None = None) -> None:
        super().__init__()
        self.leak = _checked(leak)
        first = drawn_seed() if seed is None else integer("seed", seed, 0, LARGEST_SEED)
        stream = torch.tensor([signed(first), _OWN_STREAM], dtype=torch.int64, device="cpu")
        self.register_buffer("_stream", stream)
        self._coefficients: dict[int, PerDevice] = {}

    @property
    def seed(self) -> int:
        """The seed. On a device, the host waits for it."""
        return int(self._stream[0]) % 2**64

    def check_tasks(self, n_tasks: int) -> None:
        """Raise ValueError if there is a leak for each of another number of tasks."""
        if isinstance(self.leak, list) and len(self.leak) != n_tasks:
            raise ValueError(f"leak has {len(self.leak)} entries for {n_tasks} tasks: {self.leak}")

    def combine_entries(self, entries: Entries) -> None:
        """Write the gradients of one sign at each entry; see :meth:`Entrywise.combine_entries`."""
        rows, like = entries.rows, sample(entries.rows.grads)
        coefficients = self._of_tasks(rows.n_tasks, like)
        if entries.present is not None:
            ones = torch.ones((2, rows.n_tasks), dtype=arithmetic_dtype(like.dtype), device=like.device)
            if coefficients is None:
                ones[1] = 0
            coefficients = (ones if coefficients is None else coefficients) * entries.present
        coins = Coins(entries.positions, self._on_device(like))
        operators.graddrop(rows, coins, coefficients, entries.out, entries.mask, entries.kept)

    def advance(self, like: Tensor) -> None:
        """Move on to the next step's numbers. The device does it, so each replay of a captured CUDA graph does it."""
        if has_numbers(like):  # a step without numbers changes no state
            self._stream[1].add_(1)

    def _on_device(self, like: Tensor) -> Tensor:
        if not has_numbers(like):
            return like.new_empty(2, dtype=torch.int64)
        if self._stream.device != like.device:
            self._stream = self._stream.to(like.device)  # once, at the first step
        return self._stream

    def _of_tasks(self, n_tasks: int, like: Tensor) -> Tensor | None:
        """Return the shares that pass where a sign is chosen and where it is not, (2, T); None for ones and zeros."""
        leaks = self.leak if isinstance(self.leak, list) else [self.leak] * n_tasks
        if not any(leaks):
            return None
        if n_tasks not in self._coefficients:
            self._coefficients[n_tasks] = PerDevice([[1.0] * n_tasks, leaks])
        return self._coefficients[n_tasks].on(like.device, arithmetic_dtype(like.dtype))

    def __repr__(self) -> str:
        return f"GradDrop(leak={self.leak}, seed={self.seed})"


def _checked(leak: object) -> float | list[float]:
    if isinstance(leak, (list, tuple)) or getattr(leak, "ndim", 0) > 0:
        return [number(f"leak[{i}]", share, least=0, most=1) for i, share in enumerate(numbers("leak", leak))]
    return number("leak", leak, least=0, most=1)
