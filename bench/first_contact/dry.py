"""A dry run's stand-in for a GPU: the kernels serve the CPU, in Triton's interpreter."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bench.first_contact.child import SKIP


@contextmanager
def kernels_serve(device: torch.device) -> Iterator[None]:
    """Let the kernels serve the device, as they do a GPU. Without the interpreter the process ends as skipped."""
    if device.type != "cpu":
        yield
        return
    from tests import interpreter

    why_not = interpreter.why_not()
    if why_not is not None:
        print(why_not)
        sys.exit(SKIP)
    with interpreter.serving_the_cpu():
        yield
