"""What is done with each kernel: its comparison with the reference, a run of it, and the bytes that this moves."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from gradkern.check import cases
from gradkern.check.problems import Shapes
from gradkern.check.selfcheck import compared
from gradkern.kernels.served import Key
from gradkern.ops import operators, project
from gradkern.ops.devices import CPU
from gradkern.ops.dtypes import DTYPES, arithmetic_dtype
from gradkern.ops.registry import Cases, Comparison
from gradkern.tuning.candidates import KERNELS, Setting
from gradkern.tuning.forced import Forced
from gradkern.tuning.inputs import Inputs

Case = Callable[[torch.dtype, torch.device, Shapes], Iterator[Comparison]]


class Subject(NamedTuple):
    """A kernel, or what stands for it on a CPU."""

    checks: tuple[Case, ...]
    """The cases of the self-check for its operators."""
    run: Callable[[Inputs], object]
    moved: Callable[[Inputs], int]
    """The bytes that a run must read and write."""


def _gramian(x: Inputs) -> None:
    operators.gramian_tensors(x.rows, None)


def _combine(x: Inputs) -> None:
    operators.combine_tensors(x.rows, x.w, x.out, None, None)


def _project(x: Inputs) -> None:
    project(x.J, x.W)


def _adamw(x: Inputs) -> None:
    operators.adamw(x.rows, x.w, x.state, x.step, None, None)


def _words(x: Inputs, rows: int) -> int:
    return rows * x.P * x.dtype.itemsize


_GRAMIAN = Subject((cases.of_gramian, cases.of_gramian_tensors), _gramian, lambda x: _words(x, x.T))
_COMBINE = Subject((cases.of_combine, cases.of_combine_tensors), _combine, lambda x: _words(x, x.T + 1))
SUBJECTS = {
    "gramian": _GRAMIAN,
    "pieces": _GRAMIAN,
    "chunks": _GRAMIAN,
    "combine": _COMBINE,
    "columns": _COMBINE,
    "project": Subject((cases.of_project,), _project, lambda x: _words(x, 2 * x.T)),
    # Rows in; a parameter and two moments both ways.
    "adamw": Subject(
        (cases.of_adamw,), _adamw, lambda x: _words(x, x.T + 2) + 4 * x.P * arithmetic_dtype(x.dtype).itemsize
    ),
}
"""All but the one launch (``sizes.py``)."""

TILES = 9005
"""Columns of a kernel's check: three tiles, the last of them short, so that both roads of the loads are taken. Rows of
that length start at addresses with 128-bit loads."""
BLOCKS = (1 << 20) + 1037
"""Numbers in the rows of a CPU's check: more than any block of scratch memory holds."""


def problem(key: Key, setting: Setting, device: torch.device) -> str | None:
    """Return what is wrong with the results of a setting, in words; None if they are right."""
    P = BLOCKS // key.rows if key.kernel in KERNELS[CPU.type] else TILES
    with Forced({key: setting}):
        return _first_problem(SUBJECTS[key.kernel].checks, key, [(key.rows, P)], device)


def problem_of_one_launch(key: Key, device: torch.device) -> str | None:
    """Return what is wrong with the results of the one launch; None if they are right."""
    return _first_problem((cases.of_surgery,), key, [(key.rows, TILES)], device)


def _first_problem(checks: tuple[Case, ...], key: Key, shapes: Shapes, device: torch.device) -> str | None:
    dtypes = [dtype for dtype in DTYPES if served_itemsize(key, dtype) == key.itemsize]
    outcomes = (compared(_of_shapes(case, shapes), device, dtypes) for case in checks)
    return next((outcome.problem for outcome in outcomes if outcome.problem is not None), None)


def _of_shapes(case: Case, shapes: Shapes) -> Cases:
    return lambda dtype, device: case(dtype, device, shapes)


def served_itemsize(key: Key, dtype: torch.dtype) -> int:
    """Return the bytes of a number by which a launch on rows of a dtype finds its setting.

    Kernels go by the rows as they are stored. A CPU's blocks hold numbers in arithmetic dtype.
    """
    return arithmetic_dtype(dtype).itemsize if key.kernel in KERNELS[CPU.type] else dtype.itemsize
