"""The Triton kernels on CPU tensors, by Triton's interpreter, in place of the PyTorch back end."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from gradkern.ops import registration


def why_not() -> str | None:
    """Why the interpreter cannot run here, if it cannot."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.is_available():
        return "with a GPU the kernels are compiled, not interpreted"
    import triton

    old = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7)
    if old and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        return f"the interpreter of Triton {triton.__version__} fails with NumPy {np.__version__}"
    return None


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """PyTorch's deterministic mode fills whatever ``torch.empty`` and its relatives return with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


interpreted = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def triton_implementations() -> dict[Any, Callable[..., Any]]:
    """The Triton back end's function for each operator, as registered for CUDA."""
    from gradkern.ops import cuda

    ops = torch.ops.gradkern
    return {
        ops.gramian.default: cuda.gramian,
        ops.gramian.tensors: cuda.gramian_tensors,
        ops.gramian.masked: cuda.gramian_masked,
        ops.combine.default: cuda.combine,
        ops.combine.tensors: cuda.combine_tensors,
        ops.combine.masked: cuda.combine_masked,
        ops.project.default: cuda.project,
        ops.project.tensors: cuda.project_tensors,
        ops.gather.default: cuda.gather,
        ops.scatter.default: cuda.scatter,
        ops.pcgrad.default: cuda.pcgrad,
        ops.pcgrad.matrix: cuda.pcgrad_matrix,
        ops.gradvac.default: cuda.gradvac,
        ops.adamw.default: cuda.adamw,
        ops.adamw.masked: cuda.adamw_masked,
    }


@contextmanager
def serving_the_cpu() -> Iterator[list[str]]:
    """Have the kernels serve CPU tensors; yields the list of operators they have served."""
    calls: list[str] = []

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            calls.append(function.__name__)
            return function(*args, **kwargs)

        return run

    library = torch.library.Library("gradkern", "IMPL")
    for op, function in triton_implementations().items():
        served = registration.serving[op.name()]["cpu"] = noted(function)
        library.impl(op, served, "CPU")
    try:
        yield calls
    finally:
        library._destroy()
        for op in triton_implementations():
            del registration.serving[op.name()]["cpu"]
