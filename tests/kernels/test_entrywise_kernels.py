"""The kernels of GradDrop and of the trimmed mean against the reference: every form of rows, masks and coefficients.

Whatever is dropped is NaN here, and so is what the kernels leave unwritten: it is in no result.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gradkern import reference
from gradkern.ops.arguments import Coins, TaskGrads
from gradkern.ops.layout import TILE
from tests import interpreter
from tests.tolerances import DTYPES, TOLERANCES, assert_near

pytest.importorskip("triton", reason="no Triton on this platform")
if (reason := interpreter.why_not()) and not torch.cuda.is_available():
    pytest.skip(reason, allow_module_level=True)

from gradkern.ops.pytorch import entrywise as pytorch
from gradkern.ops.triton.entrywise import graddrop, trimmed_mean
from tests.kernels.test_masked_kernels import ALL, DEVICE, PARAMETERS, Problem, problem

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, in the interpreter

F32 = torch.float32
NOTHING_DROPPED = (-3, 1 << 40, 0)
MASKED = (-3, 1 << 40, int(0.45 * ALL))
SEED, STEP = 2**63 + 5, (1 << 32) + 7
POSITIONS = [8, (1 << 34) + 4, 0, (1 << 32) - 64, 4200]
FORMS = [
    *((3, dtype, block, pad) for dtype in DTYPES for block in (1, 128) for pad in (0, 1)),
    *((T, F32, 1, 0) for T in (1, 4, 5, 9, 40)),
    *((5, F32, block, 0) for block in (2, 3, 8192)),
]


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with interpreter.unwritten_is_nan():
        yield


def unwritten(given: Problem) -> list[Tensor]:
    return [torch.full((n,), torch.nan, dtype=given.dtype, device=DEVICE) for n in given.parameters.numels]


def coins() -> Coins:
    return Coins(POSITIONS, torch.tensor([SEED - 2**64, STEP - 2**63], device=DEVICE))


def places() -> Tensor:
    return torch.cat([p + torch.arange(n) for p, n in zip(POSITIONS, PARAMETERS.numels, strict=True)])


def assert_result(given: Problem, out: list[Tensor], expected: Tensor, masked: bool, kept: Tensor) -> None:
    scale = given.J.abs().sum(0) + torch.finfo(given.dtype).smallest_normal
    result = torch.cat(out).cpu()
    expected = torch.where(given.keep, expected, 0.0)
    assert_near(result, expected, scale, TOLERANCES[given.dtype])
    assert not result[~given.keep].any()
    counted = given.keep & (given.parameters.of_entries(given.parameters.units) >= 0)
    assert int(kept) == (int(counted.sum()) if masked else 0)


@pytest.mark.parametrize("leaks", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("T", "dtype", "block", "pad"), FORMS)
def test_graddrop(T: int, dtype: torch.dtype, block: int, pad: int, masked: bool, leaks: bool) -> None:
    given = problem(T, dtype, block, state=MASKED if masked else NOTHING_DROPPED, pad=pad)
    out, kept, leak = unwritten(given), torch.tensor(0, device=DEVICE), torch.rand(T)
    coefficients = torch.stack((torch.ones(T), leak)).to(DEVICE) if leaks else None
    graddrop(given.rows, coins(), coefficients, out, given.mask if masked else None, kept)
    rows = list(given.J.to(dtype))
    expected = reference.graddrop(rows, leak.tolist() if leaks else 0.0, SEED, STEP, places())
    assert_result(given, out, expected, masked, kept)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("T", "dtype", "block", "pad"), FORMS)
def test_trimmed_mean(T: int, dtype: torch.dtype, block: int, pad: int, masked: bool, weighted: bool) -> None:
    given = problem(T, dtype, block, state=MASKED if masked else NOTHING_DROPPED, pad=pad)
    present = [t % 3 != 1 for t in range(T)]
    weights = torch.tensor(present, device=DEVICE).to(F32) if weighted else None
    for k in {0, min(1, (T - 1) // 2), min(12, (T - 1) // 2)}:
        out, kept = unwritten(given), torch.tensor(0, device=DEVICE)
        trimmed_mean(given.rows, k, weights, out, given.mask if masked else None, kept)
        expected = reference.trimmed_mean(list(given.J), k, present if weighted else None)
        assert_result(given, out, expected, masked, kept)


def test_a_result_may_take_the_place_of_any_row() -> None:
    for t in range(3):
        given = problem(3, F32, 1, state=NOTHING_DROPPED)
        n, rows = len(PARAMETERS.numels), list(given.J.float())
        for combine, expected in (
            (lambda rows, out: graddrop(rows, coins(), None, out), reference.graddrop(rows, 0.0, SEED, STEP, places())),
            (lambda rows, out: trimmed_mean(rows, 1, None, out), reference.trimmed_mean(rows, 1)),
        ):
            grads = [None if g is None else g.clone() for g in given.rows.grads]
            fresh = unwritten(given)
            out = [f if g is None else g for g, f in zip(grads[t * n : (t + 1) * n], fresh, strict=True)]
            combine(TaskGrads(grads, PARAMETERS.segments, PARAMETERS.n_segments), out)
            assert_near(torch.cat(out).cpu(), expected, given.J.abs().sum(0), TOLERANCES[F32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bits_are_those_of_the_other_back_end(dtype: torch.dtype) -> None:
    """Nothing is multiplied, so nothing is rounded together: the sums of signs have the same bits."""
    grads = [torch.randn(n, dtype=dtype) * 10 ** (t - 2) for t in range(5) for n in (TILE + 9, 301)]
    results = []
    for module, device in ((pytorch, "cpu"), (None, DEVICE)):
        rows = TaskGrads([g.to(device) for g in grads], [0, 0], 1)
        out = [torch.empty(n, dtype=dtype, device=device) for n in (TILE + 9, 301)]
        given = Coins([4, 8192], torch.tensor([3, 1 - 2**63], device=device))
        (graddrop if module is None else module.graddrop)(rows, given, None, out)
        results.append(torch.cat(out).cpu())
    assert torch.equal(*results)
