"""A launch as a value: what a launcher decided, kept apart from doing it.

The launchers are functions that return a :class:`Launch`. Running it is one call; the ahead-of-time gate compiles
the very same values for machines that are not there, so what it checks cannot drift from what is launched.

Triton's own way from arguments to a compiled kernel costs the host more than the launch itself. So the kernel that a
first call compiled is kept, and launched from then on. Its key is all that such a kernel is compiled for: constants,
types of arguments, options of the launch and the device. The values of arguments are not in the key: :func:`kernel` has
Triton compile for no value, neither for where a tensor starts nor for the divisors of a number.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from inspect import signature
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


def kernel(function: Callable[..., None]) -> Any:
    """``triton.jit`` that compiles for no value of an argument but the constants'.

    An integer argument has its type written beside it, or fits in 32 bits. Else Triton takes 64 bits for a large one.
    """
    arguments = signature(function).parameters.values()
    return triton.jit(function, do_not_specialize=[a.name for a in arguments if a.annotation is not tl.constexpr])


class Launch(NamedTuple):
    """One kernel launch."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    threads: int
    fp_fusion: bool
    """Whether a multiplication and an addition may be rounded together. It is spelled out, because Triton's default
    changes with its versions. Streaming kernels gain from it. Programs on T x T numbers do without: where rows
    coincide, their comparisons hang on the last bit."""

    def run(self, device: torch.device) -> None:
        """Launch on the current stream of ``device``; with an empty grid do nothing."""
        if 0 not in self.grid:
            with _on(device):
                if isinstance(self.kernel, triton.JITFunction):
                    self._run_compiled(device)
                else:  # by Triton's interpreter
                    self.kernel[self.grid](**self.arguments)

    def compile(self) -> Any:
        """Compile for Triton's active target, launch nothing."""
        warp = triton.runtime.driver.active.get_current_target().warp_size
        return self.kernel.warmup(**self.arguments, **self._options(warp), grid=self.grid)

    def _run_compiled(self, device: torch.device) -> None:
        values = [self.arguments[name] for name in self.kernel.arg_names]
        kinds = [getattr(value, "dtype", type(value)) for value in values]
        for i in self.kernel.constexprs:
            kinds[i] = values[i]
        # By the function, since a JITFunction's own hash is that of its source text.
        key = (self.kernel.fn, self.threads, self.fp_fusion, device, *kinds)
        compiled = _compiled.get(key)
        if compiled is None:
            _compiled[key] = self.kernel[self.grid](*values, **self._options(warp_size(device)))
        else:
            compiled[(*self.grid, 1, 1)[:3]](*values)

    def _options(self, warp: int) -> dict[str, Any]:
        return {"num_warps": max(1, self.threads // warp), "enable_fp_fusion": self.fp_fusion}


@cache
def warp_size(device: torch.device) -> int:
    """Return the threads of a warp: 32 on NVIDIA, 64 on AMD's data-centre GPUs."""
    return 32 if device.type == "cpu" else int(torch.cuda.get_device_properties(device).warp_size)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Make ``device`` the current one, on which Triton launches."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


_compiled: dict[tuple[Any, ...], Any] = {}
