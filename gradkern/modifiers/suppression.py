"""Gradient suppression drops entries of the gradients at random, by a counter-based random stream.

Seed, step and position decide whether an entry is dropped, and this function is evaluated wherever it is needed. So no
mask is stored, the Gramian and the combination of a step use the same mask, and a resumed run continues with the same
masks.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradkern.arguments import choice, integer, mapping, number
from gradkern.ops.philox import LARGEST_SEED, drawn_seed, signed
from gradkern.ops.undo import PutBack, numbers_of

SCOPES = ("update", "all")


class MaskState(NamedTuple):
    """The mask of a step, for any parameters; see :class:`gradkern.ops.arguments.Mask`.

    Attributes:
        block: the number of entries of a unit.
        state: (3,) int64, on the device: seed, step and threshold.
    """

    block: int
    state: Tensor

    def advance(self) -> None:
        """Move to the next step. The device does it, so each replay of a captured CUDA graph does it too."""
        self.state[1].add_(1)


class Suppression:
    """Suppresses shared parameters' gradients at random, with any method.

    See Rhapsody on a Theme of Gradient Surgery, §3.5.

    Each step drops every entry with probability ``p``, the same entries for all tasks, and updates the rest as usual.
    A dropped entry's gradient is exactly 0: momentum and weight decay still move the parameter. Parameters that only
    one loss reaches are never masked. If each step has one task only, name the shared parameters by ``shared=``. Each
    call of ``backward`` is a step.

    Args:
        p: the probability that an entry is dropped, from 0 to below 1. The report tries 0.30, 0.45 and 0.60.
        block: the number of neighbouring entries of a parameter, in memory order, that are kept or dropped together.
            The report uses 1. From 128 on, memory traffic falls with ``p``, because dropped blocks are never loaded.
            Powers of two are fastest.
        scope: "update", as in the report, masks the update but takes dot products over all entries; "all" takes dot
            products over the kept entries only, so that dropped ones are never read.
        seed: from 0 to 2⁶⁴ - 1; None to draw one from torch's default generator.
    """

    def __init__(self, p: float, block: int = 1, scope: str = "update", seed: int | None = None) -> None:
        self.p = number("p", p, least=0, below=1)
        self.block = integer("block", block, 1, 2**30)
        self.scope = choice("scope", scope, SCOPES)
        self.seed = drawn_seed() if seed is None else integer("seed", seed, 0, LARGEST_SEED)
        self._state = self._fresh(self.seed, 0)

    def mask(self, device: torch.device) -> MaskState:
        """Return the mask of the current step, on ``device``."""
        if device.type == "meta":
            return MaskState(self.block, self._state.to(device))  # a step without numbers changes no state
        if self._state.device != device:
            self._state = self._state.to(device)  # once, at the first step
        return MaskState(self.block, self._state)

    def first_units(self, numels: Sequence[int]) -> list[int]:
        """Return the number of each parameter's first unit. Its ⌈numel / block⌉ units are rounded up to fours."""
        fours = [-(-numel // (4 * self.block)) for numel in numels]
        return [4 * n for n in accumulate(fours, initial=0)][:-1]

    def state_dict(self) -> dict[str, int]:
        """Return seed and step, the current position in the stream of masks."""
        return {"seed": self.seed, "step": int(self._state[1])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the position of a :meth:`state_dict`.

        Raises:
            TypeError, ValueError: ``state_dict`` has another form. Nothing has changed then.
        """
        mapping("state_dict", state_dict, ("seed", "step"))
        seed, step = integer("seed", state_dict["seed"], 0, LARGEST_SEED), integer("step", state_dict["step"], 0)
        self.seed = seed
        self._state.copy_(self._fresh(seed, step))  # in place: a captured CUDA graph reads it there

    def snapshot(self) -> PutBack:
        """Return a function that puts the position in the stream of masks back as it is when this is called."""
        seed, put_numbers_back = self.seed, numbers_of(self._state)

        def put_back() -> None:
            self.seed = seed
            put_numbers_back()

        return put_back

    def _fresh(self, seed: int, step: int) -> Tensor:
        return torch.tensor([signed(seed), step, round(self.p * 2**32)], dtype=torch.int64, device="cpu")

    def __repr__(self) -> str:
        return f"Suppression(p={self.p}, block={self.block}, scope={self.scope!r}, seed={self.seed})"
