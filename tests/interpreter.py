"""Tools that run the Triton kernels on CPU tensors, in place of the PyTorch back end.

Triton's interpreter runs them; with ``pytest --ptx``, the emulator of ``tests/ptx`` does.
"""

import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from gradkern.ops import registry
from gradkern.ops.triton.backend import BACKEND
from tests.ptx import option

TRITON = BACKEND.device_type


def why_not() -> str | None:
    """Return why neither the interpreter nor the emulator can run here; None if one can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if option.wanted():
        return option.why_not()
    if torch.cuda.is_available():
        return "with a GPU the kernels are compiled, not interpreted"
    import triton

    old = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7)
    if old and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        return f"the interpreter of Triton {triton.__version__} fails with NumPy {np.__version__}"
    return None


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """Fill every tensor of ``torch.empty`` and its relatives with NaN, by PyTorch's deterministic mode."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@contextmanager
def programs_at_once(n: int) -> Iterator[None]:
    """Run every launch as ``n`` processes at once, each of which is one of ``n`` programs.

    This is for kernels whose programs divide the work among themselves, however many there are. The tensors given to a
    launch move to memory that the processes share. Tensors that are written through a table of addresses must be there
    already. The emulator needs no processes: it has programs of its own, and weak memory.
    """
    if option.wanted():
        with option.programs_at_once(n):
            yield
        return
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
        # No tensor was copied for the interpreter. Copying one back onto itself would undo concurrent writes.
        patched.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)
        yield


_fork = multiprocessing.get_context("fork")

interpreted = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def triton_operators() -> list[registry.Operator[..., Any]]:
    """Return the operators that the Triton back end implements."""
    from gradkern.ops.one_launch import surgery  # noqa: F401  (registers)
    from gradkern.ops.triton import adamw, combine, entries, entrywise, gramian, methods, solvers  # noqa: F401  (register)

    return [op for op in registry.operators.values() if TRITON in op.implementations]


def triton_implementation(overload: Any) -> Callable[..., Any]:
    """Return the Triton back end's function for an operator, with the dispatcher's arguments."""
    op = next(op for op in triton_operators() if op.overload == overload)
    return op.on_flat(op.implementations[TRITON])


@contextmanager
def serving_the_cpu() -> Iterator[list[str]]:
    """Let the kernels serve CPU tensors, and yield the list of operators they have served."""
    calls: list[str] = []

    def noted(op: registry.Operator[..., Any]) -> Callable[..., Any]:
        function = op.implementations[TRITON]

        def run(*args: Any, **kwargs: Any) -> Any:
            calls.append(op.name)
            return function(*args, **kwargs)

        return run

    served = triton_operators()
    library = torch.library.Library("gradkern", "IMPL")
    for op in served:
        op.implementations["cpu"] = noted(op)
        library.impl(op.overload, op.on_flat(op.implementations["cpu"]), "CPU")
    try:
        yield calls
    finally:
        library._destroy()
        for op in served:
            del op.implementations["cpu"]
