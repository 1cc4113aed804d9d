"""``gradkern info`` prints versions and the back end of each device, and checks every operator and method.

Each operator and each method runs on every device in every dtype and is compared with :mod:`gradkern.reference`,
which computes in float64 on the CPU. An error is relative to the size of the terms that were summed, not to their sum,
because terms may cancel in the sum.
"""

import importlib.metadata
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import gradkern
from gradkern.check import (
    cases,  # noqa: F401  (registers the operators' cases)
    solver_cases,  # noqa: F401
)
from gradkern.check.bits import differences
from gradkern.check.methods import CASES as METHODS
from gradkern.ops import backend, processor, registry
from gradkern.ops.devices import GPU
from gradkern.ops.dtypes import DTYPES
from gradkern.ops.registry import Cases
from gradkern.ops.tables.card import gpu
from gradkern.ops.tables.reading import serving

ALLOWED = {torch.float32: 3e-6, torch.float64: 1e-13, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""The largest allowed error of a result, by its dtype. float64: some hundred roundings of 1e-16. float32: sums of up to
2048 random terms at a time, whose roundings of 6e-8 cancel down to about sqrt(2048) of them. bfloat16 and float16: the
arithmetic is float32 and only the store rounds, by half a unit in the last place of 8 and 11 bits; twice that is
allowed."""

NOTHING = "nothing was compared"
"""The problem of a check that compares nothing in the dtypes asked for."""


def info() -> int:
    """Print versions, devices, back ends and the self-check. Return the exit status, 1 if anything is wrong."""
    for name, version in (versions() | on_the_cpu()).items():
        print(f"{name:10}{version}")
    print("\ndevices and the back ends that serve them")
    for device in devices():
        name, reason = backend(device.type)
        print(f"{device!s:10}{describe(device)}\n{'':10}{name}: {reason}\n{'':10}settings: {serving(device).origin}")
    print(
        "\nself-check against gradkern.reference: largest error relative to the terms summed, by the dtype of the rows"
    )
    print(_line("", "", [_short(dtype) for dtype in DTYPES]))
    failed = 0
    for device in devices():
        for operator in checks(device.type):
            outcome = check(operator, device)
            failed += outcome.problem is not None
            errors = [f"{outcome.errors[d]:.1e}" if d in outcome.errors else "-" for d in DTYPES]
            print(f"{_line(operator, str(device), errors)}  {outcome.verdict}", flush=True)
    difference = other_bits()
    verdict = "the same" if difference is None else f"DIFFERENT, {difference}"
    print(f"{'bits':25}{'cpu':8}at other addresses, in other layouts, by other numbers of threads: {verdict}")
    n = sum(len(checks(device.type)) for device in devices())
    print(
        f"{failed} of {n} checks FAILED"
        if failed
        else f"all {n} checks OK" + (", but bits differ" if difference else "")
    )
    return 1 if failed or difference else 0


def versions() -> dict[str, str]:
    """Return the installed versions by name. If Triton is missing, its entry says why."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError as error:
        triton_version = f"none: {error}" + ("" if platform.system() == "Linux" else "; it exists for Linux only")
    return {
        "gradkern": gradkern.__version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "numpy": importlib.metadata.version("numpy"),
    }


def on_the_cpu() -> dict[str, str]:
    """Return the facts that decide how CPU tensors are computed, by name."""
    return {
        "processor": processor.described(),
        "BLAS": f"{processor.blas()}, code path: {processor.dispatch()}",
        "threads": processor.threads(),
    }


def devices() -> list[torch.device]:
    """Return the CPU and every CUDA (or ROCm) device."""
    return [torch.device("cpu"), *(torch.device(GPU, i) for i in range(torch.cuda.device_count()))]


def describe(device: torch.device) -> str:
    """Return the kind of a device."""
    if device.type == "cpu":
        return platform.machine()
    return gpu(device)


@dataclass(frozen=True)
class Outcome:
    """Result of the check of an operator or a method.

    Attributes:
        errors: the largest error in each dtype that was reached.
        problem: the first wrong result, in words, or None.
    """

    errors: dict[torch.dtype, float]
    problem: str | None

    @property
    def verdict(self) -> str:
        """The words "OK", or "FAILED" and the problem."""
        return "OK" if self.problem is None else f"FAILED: {self.problem}"


def checks(device_type: str) -> dict[str, Cases]:
    """Return the checks for a type of device, by name: the operators that it has, and all methods."""
    return {
        name: op.cases
        for name, op in registry.operators.items()
        if op.cases is not None and {device_type, registry.DEFAULT} & set(op.implementations)
    } | METHODS


def check(operator: str, device: torch.device, dtypes: Sequence[torch.dtype] = DTYPES) -> Outcome:
    """Compare an operator or a method with the reference."""
    return compared(checks(device.type)[operator], device, dtypes)


def compared(compare: Cases, device: torch.device, dtypes: Sequence[torch.dtype] = DTYPES) -> Outcome:
    """Compare the results of some cases with the reference. An exception is a failure too."""
    errors: dict[torch.dtype, float] = {}
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        try:
            return Outcome(errors, next(_wrong(compare, device, dtypes, errors), None))
        except Exception as error:  # a kernel may not compile; the other operators are still checked
            return Outcome(errors, f"{type(error).__name__}: {error}")


def other_bits() -> str | None:
    """Describe the first change of bits on the CPU between equal numbers; return None if there is none."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        try:
            return next(differences(), None)
        except Exception as error:  # the operator's own check says more
            return f"{type(error).__name__}: {error}"


def _wrong(
    compare: Cases, device: torch.device, dtypes: Sequence[torch.dtype], errors: dict[torch.dtype, float]
) -> Iterator[str]:
    """Yield a description of each result whose error is too large. Write each dtype's largest error to ``errors``."""
    for dtype in dtypes:
        for result, expected, size in compare(dtype, device):
            error, allowed = _error(result, expected, size), ALLOWED[result.dtype]
            right = error <= allowed  # False for NaN
            errors[dtype] = max(errors.get(dtype, 0.0), error) if right else error
            if not right:
                yield f"{_short(dtype)}, {tuple(result.shape)}: error {error:.1e}, at most {allowed:.0e} allowed"
    if not errors:
        yield NOTHING


def _error(result: Tensor, expected: Tensor, size: Tensor) -> float:
    """Return the largest |result - expected| / size; NaN if any entry is."""
    if result.shape != expected.shape:
        raise ValueError(f"shape {tuple(result.shape)} in place of {tuple(expected.shape)}")
    error = (result.double().cpu() - expected).abs()
    # Below its smallest normal number a dtype rounds to a fixed step, not in proportion. float16 reaches such numbers.
    relative = error / size.clamp_min(torch.finfo(result.dtype).smallest_normal)
    return relative.max().item() if relative.numel() else 0.0


def _line(operator: str, device: str, errors: Sequence[str]) -> str:
    return f"{operator:25}{device:8}" + "".join(f"{error:>10}" for error in errors)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
