"""The rows that kernels are measured on: random, larger than any cache, and cut into tensors as a model's are."""

from functools import cached_property

import torch
from torch import Tensor

from gradkern.ops.arguments import AdamWState, AdamWStep, TaskGrads
from gradkern.ops.devices import CPU, GPU
from gradkern.ops.dtypes import arithmetic_dtype
from gradkern.tuning import clock

BYTES = {CPU.type: 1 << 27, GPU: 1 << 32}
"""The most bytes of the rows together, by the type of the device: several times what its caches hold, and on a GPU so
many that launching takes no part of the time."""
SHARE = 8
"""The part of the free memory that rows may take: there are copies, results and an optimizer's state beside them."""
TENSORS = {CPU.type: 2, GPU: 64}
"""The tensors that a row is cut into: many, as a model has, or on a CPU large ones, which alone are cut into blocks."""
LINE = 64
"""Elements between the starts of tensors are a multiple of this, so that all loads may be of 128 bits."""


class Inputs:
    """T rows of numbers of a dtype, and what the kernels need beside them. Each part is made at first use.

    Args:
        T: the number of rows.
        dtype: their dtype.
        device: their device.
        P: the length of a row; None for as long as the memory allows.
        groups: whether each tensor is a group of its own.
    """

    def __init__(
        self, T: int, dtype: torch.dtype, device: torch.device, P: int | None = None, groups: bool = False
    ) -> None:
        self.T, self.dtype, self.device = T, dtype, device
        self.P = longest(T, dtype, device) if P is None else P
        size = max(LINE, self.P // TENSORS[device.type] // LINE * LINE)
        self.sizes = [min(size, self.P - start) for start in range(0, self.P, size)]
        self.segments = list(range(len(self.sizes))) if groups else [0] * len(self.sizes)

    @cached_property
    def J(self) -> Tensor:
        """The rows as a matrix, (T, P)."""
        return self._random(self.T, self.P)

    @cached_property
    def copied(self) -> Tensor:
        """Memory for a copy of the rows."""
        return torch.empty_like(self.J)

    def copy(self) -> None:
        """Copy the rows, the yardstick of all times."""
        self.copied.copy_(self.J)

    @cached_property
    def rows(self) -> TaskGrads:
        """The same rows as lists of tensors."""
        return TaskGrads([g for row in self.J for g in row.split(self.sizes)], self.segments, self.n_segments)

    @property
    def n_segments(self) -> int:
        """The number of groups."""
        return self.segments[-1] + 1

    @cached_property
    def w(self) -> Tensor:
        """Weights, (S, T)."""
        return torch.rand(self.n_segments, self.T, device=self.device).to(arithmetic_dtype(self.dtype)) + 0.5

    @cached_property
    def W(self) -> Tensor:
        """The coefficients of a projection, (T, T)."""
        return torch.rand(self.T, self.T, device=self.device).to(arithmetic_dtype(self.dtype)) + 0.5

    @cached_property
    def keys(self) -> Tensor:
        """The keys of random orders, (S, T, T)."""
        return torch.rand(self.n_segments, self.T, self.T, device=self.device)

    @cached_property
    def out(self) -> list[Tensor]:
        """Memory for a combination."""
        return list(torch.empty_like(self.J[0]).split(self.sizes))

    @cached_property
    def state(self) -> AdamWState:
        """What a step of AdamW changes. Moments are in arithmetic dtype."""
        moments = [torch.zeros(self.P, dtype=arithmetic_dtype(self.dtype), device=self.device) for _ in range(2)]
        steps = [torch.ones((), device=self.device) for _ in self.sizes]
        params = list(self._random(self.P).split(self.sizes))
        return AdamWState(params, [part for m in moments for part in m.split(self.sizes)], steps)

    @cached_property
    def step(self) -> AdamWStep:
        """The numbers of a step of AdamW."""
        return AdamWStep(None, None, [1e-3, 0.9, 0.999, 0.01, 1e-8])

    def _random(self, *shape: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(0)  # it leaves the user's generator alone
        return torch.randn(shape, dtype=self.dtype, device=self.device, generator=generator)


def longest(T: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return the greatest length of T rows that the memory allows."""
    room = min(BYTES[device.type], clock.free_bytes(device) // SHARE)
    return max(LINE, room // (T * dtype.itemsize) // LINE * LINE)
