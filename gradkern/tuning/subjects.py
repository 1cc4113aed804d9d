"""What is done with each kernel: its comparison with the reference, a run of it, and the bytes that this moves."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import product
from typing import NamedTuple

import torch

from gradkern.check import cases
from gradkern.check.problems import Shapes
from gradkern.check.selfcheck import compared
from gradkern.kernels.served import Key
from gradkern.ops import operators, project
from gradkern.ops.devices import CPU, GPU
from gradkern.ops.dtypes import DTYPES, arithmetic_dtype
from gradkern.ops.registry import Cases, Comparison
from gradkern.ops.tables.candidates import KERNELS, Setting
from gradkern.tuning.compiling import compiling
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


def problem(key: Key, setting: Setting | None, device: torch.device) -> str | None:
    """Return what is wrong with the results of a setting, in words; None if they are right.

    Args:
        key: the launches that it is for.
        setting: the setting; None for the one launch, which is checked whatever the sizes it is for.
        device: the device.
    """
    with _under(key, setting):
        outcomes = (compared(case, device, dtypes_of(key)) for case in _checks(key))
        return next((outcome.problem for outcome in outcomes if outcome.problem is not None), None)


def compile_ahead(key: Key, settings: Sequence[Setting | None], device: torch.device) -> None:
    """Compile the kernels that the checks of the settings launch on a GPU. What fails here fails in the check too."""
    if device.type != GPU:
        return
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), compiling():
        for setting, case, dtype in product(settings, _checks(key), dtypes_of(key)):
            with _under(key, setting), suppress(Exception):
                for _comparison in case(dtype, device):
                    pass


def dtypes_of(key: Key) -> list[torch.dtype]:
    """Return the dtypes of rows whose launches find their setting by this key.

    Kernels go by the rows as they are stored. A CPU's blocks hold numbers in arithmetic dtype.
    """
    of_cpu = key.kernel in KERNELS[CPU.type]
    return [d for d in DTYPES if (arithmetic_dtype(d) if of_cpu else d).itemsize == key.itemsize]


def _under(key: Key, setting: Setting | None) -> Forced:
    return Forced({} if setting is None else {key: setting})


def _checks(key: Key) -> list[Cases]:
    P = BLOCKS // key.rows if key.kernel in KERNELS[CPU.type] else TILES
    checks = (cases.of_surgery,) if key.kernel == "one_launch" else SUBJECTS[key.kernel].checks
    return [partial(_of_shapes, case, [(key.rows, P)]) for case in checks]


def _of_shapes(case: Case, shapes: Shapes, dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    return case(dtype, device, shapes)
