"""Kernels compiled on all cores before a check launches them. Compiling takes most of the first run's time."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def compiling() -> Iterator[None]:
    """Let launches within the block compile their kernels in threads and launch nothing, so that results are garbage.

    A kernel that does not compile raises at its first true launch. A Triton that cannot compile in threads does so one
    kernel at a time.
    """
    import triton

    from gradkern.kernels.launch import Launch

    def compile_only(launch: Any, device: torch.device) -> None:
        if 0 not in launch.grid:
            launch.compile()

    run = Launch.run
    setattr(Launch, "run", compile_only)  # noqa: B010 (mypy lets no method be assigned)
    try:
        mode = getattr(triton, "AsyncCompileMode", None)
        if mode is None:
            yield
            return
        with ThreadPoolExecutor(os.cpu_count()) as threads, mode(threads, ignore_errors=True):
            yield
    finally:
        setattr(Launch, "run", run)  # noqa: B010
