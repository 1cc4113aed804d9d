"""A launch as a value: what a launcher decided, kept apart from doing it.

The launchers are functions that return a :class:`Launch`. Running it is one call; the ahead-of-time gate compiles
the very same values for machines that are not there, so what it checks cannot drift from what is launched.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton


class Launch(NamedTuple):
    """One kernel launch."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    threads: int

    def run(self, device: torch.device) -> None:
        """Launch on the current stream of ``device``; an empty grid is nothing to do."""
        if 0 not in self.grid:
            with _on(device):
                self.kernel[self.grid](**self.arguments, num_warps=self._warps(warp_size(device)))

    def compile(self) -> Any:
        """Compile for Triton's active target, launch nothing."""
        warp = triton.runtime.driver.active.get_current_target().warp_size
        return self.kernel.warmup(**self.arguments, num_warps=self._warps(warp), grid=self.grid)

    def _warps(self, warp: int) -> int:
        return max(1, self.threads // warp)


@cache
def warp_size(device: torch.device) -> int:
    """Threads of a warp: 32 on NVIDIA, 64 on AMD's data-centre GPUs."""
    return 32 if device.type == "cpu" else int(torch.cuda.get_device_properties(device).warp_size)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
