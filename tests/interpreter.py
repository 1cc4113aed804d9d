"""The Triton kernels on CPU tensors, by Triton's interpreter, in place of the PyTorch back end."""

import importlib.util
import multiprocessing
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


@contextmanager
def programs_at_once(n: int) -> Iterator[None]:
    """Every launch runs as ``n`` processes at once, each one program of so many.

    For kernels whose programs share out the work themselves, whatever their numbers are. The tensors that a launch is
    given move to memory that processes share; what is written through a table of addresses lies there already.
    """
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    from gradkern.kernels.launch import Launch

    run, set_grid_dim = Launch.run, InterpreterBuilder.set_grid_dim

    def run_at_once(launch: Launch, device: torch.device) -> None:
        for value in launch.arguments.values():
            if isinstance(value, torch.Tensor):
                value.share_memory_()
        programs = [_fork.Process(target=run, args=(launch._replace(grid=(1,)), device)) for _ in range(n)]
        for program in programs:
            program.start()
        for program in programs:
            program.join(60)
        stuck = [program for program in programs if program.is_alive()]
        for program in stuck:
            program.kill()
        assert not stuck, "some wait for ever"
        assert [program.exitcode for program in programs] == [0] * n

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Launch, "run", run_at_once)
        patched.setattr(InterpreterBuilder, "set_grid_dim", lambda self, *grid: set_grid_dim(self, n, 1, 1))
        # Nothing was copied for the interpreter; copied back onto itself, it would undo what others write meanwhile.
        patched.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)
        yield


_fork = multiprocessing.get_context("fork")

interpreted = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def triton_implementations() -> dict[Any, Callable[..., Any]]:
    """The Triton back end's function for each operator, as registered for CUDA."""
    from gradkern.ops.one_launch import surgery as cuda_surgery
    from gradkern.ops.triton import rows as cuda

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
        ops.pcgrad.matrix: cuda_surgery.pcgrad_matrix,
        ops.pcgrad.tensors: cuda_surgery.pcgrad_tensors,
        ops.pcgrad.masked: cuda_surgery.pcgrad_masked,
        ops.gradvac.default: cuda.gradvac,
        ops.gradvac.tensors: cuda_surgery.gradvac_tensors,
        ops.gradvac.masked: cuda_surgery.gradvac_masked,
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
