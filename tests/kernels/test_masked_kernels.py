"""The Triton kernels under gradient suppression against float64 closed forms over the entries the reference keeps.

Whatever is dropped is NaN here, and so is what the kernels leave unwritten: it is in no result.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from gradkern import reference
from gradkern.ops.arguments import Mask, TaskGrads, sample
from gradkern.ops.dtypes import arithmetic_dtype
from gradkern.ops.layout import TILE
from tests import interpreter
from tests.tolerances import DTYPES, TOLERANCES, assert_near

pytest.importorskip("triton", reason="no Triton on this platform")
if (reason := interpreter.why_not()) and not torch.cuda.is_available():
    pytest.skip(reason, allow_module_level=True)

from gradkern.kernels.masks import FEWEST_ONCE
from gradkern.ops.triton.combine import combine_tensors
from gradkern.ops.triton.gramian import gramian_tensors

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, in the interpreter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
HALF = 1 << 31
ALL = 1 << 32


class Parameters(NamedTuple):
    """Sizes, segments and first units of a model's parameters."""

    numels: list[int]
    segments: list[int]
    n_segments: int
    units: list[int]

    def of_entries(self, numbers: Sequence[int]) -> Tensor:
        """Return for each entry the number of its parameter."""
        return torch.repeat_interleave(torch.tensor(numbers), torch.tensor(self.numels))


# One tile on the fast road and shorter ones on the other; a parameter that is not masked, and unit numbers of 33 and 35
# bits; an empty segment.
PARAMETERS = Parameters([TILE + 9, 7, 0, 301, 130], [1, 0, 0, 1, 0], 3, [8, -1, 4, (1 << 34) + 4, (1 << 32) - 64])


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with interpreter.unwritten_is_nan():
        yield


class Problem(NamedTuple):
    """Gradients as the operators take them, and as a float64 matrix with zeros for what is missing or dropped."""

    rows: TaskGrads
    mask: Mask
    parameters: Parameters
    J: Tensor
    keep: Tensor
    """(P,) bool, of the entries."""

    @property
    def dtype(self) -> torch.dtype:
        """The gradients' dtype."""
        return sample(self.rows.grads).dtype


def kept_entries(state: Sequence[int], block: int, parameters: Parameters) -> Tensor:
    """Return (P,) bool, by the reference's Philox; what is not masked is kept."""
    seed, step, threshold = state
    parts = [
        reference.kept(seed % (1 << 64), step % (1 << 64), threshold / ALL, block, unit, numel)
        if unit >= 0
        else torch.ones(numel, dtype=torch.bool)
        for numel, unit in zip(parameters.numels, parameters.units, strict=True)
    ]
    return torch.cat(parts)


def problem(
    T: int,
    dtype: torch.dtype,
    block: int,
    parameters: Parameters = PARAMETERS,
    state: Sequence[int] = (-3, 1 << 40, int(0.45 * ALL)),
    pad: int = 0,
) -> Problem:
    """Return T rows of random tensors, each ``pad`` elements behind a boundary of 16 bytes; one is missing."""
    numels = parameters.numels
    keep = kept_entries(state, block, parameters)
    J = torch.randn(T, sum(numels), dtype=F64).to(dtype)
    grads: list[Tensor | None] = []
    for row in torch.where(keep, J, torch.nan):
        for part in row.split(numels):
            buffer = torch.full((pad + len(part),), torch.nan, dtype=dtype, device=DEVICE)
            buffer[pad:] = part
            grads.append(buffer[pad:])
    J = torch.where(keep, J.double(), 0)
    if T > 1:
        k = len(numels) - 1
        grads[len(numels) + k] = None
        J[1, sum(numels[:k]) :] = 0
    rows = TaskGrads(grads, parameters.segments, parameters.n_segments)
    return Problem(rows, Mask(parameters.units, block, torch.tensor(state, device=DEVICE)), parameters, J, keep)


def check_gramian(given: Problem) -> None:
    """Compare the Gramians with products of the matrix."""
    M = gramian_tensors(given.rows, given.mask).cpu()
    segment = given.parameters.of_entries(given.parameters.segments)
    assert len(M) == given.parameters.n_segments
    assert M.dtype == arithmetic_dtype(given.dtype)
    for s, M_s in enumerate(M):
        expected = given.J[:, segment == s] @ given.J[:, segment == s].T
        norms = expected.diagonal().sqrt()
        assert_near(M_s, expected, torch.outer(norms, norms), TOLERANCES[M.dtype])
        assert torch.equal(M_s, M_s.T)


def check_combined(given: Problem) -> None:
    """Compare a combination by random weights: its values, exact zeros, and the growth of ``kept``."""
    parameters, dtype = given.parameters, given.dtype
    w = torch.randn(parameters.n_segments, len(given.J), dtype=arithmetic_dtype(dtype))
    out = [torch.full((numel,), torch.nan, dtype=dtype, device=DEVICE) for numel in parameters.numels]
    kept = torch.tensor(5, device=DEVICE)
    combine_tensors(given.rows, w.to(DEVICE), out, given.mask, kept)
    weights = w.double().T[:, parameters.of_entries(parameters.segments)]
    scale = (weights * given.J).abs().sum(0) + torch.finfo(dtype).smallest_normal
    result = torch.cat(out).cpu()
    assert_near(result, (weights * given.J).sum(0), scale, TOLERANCES[dtype])
    assert not result[~given.keep].any()
    assert int(kept) == 5 + int((given.keep & (parameters.of_entries(parameters.units) >= 0)).sum())


@pytest.mark.parametrize("block", [1, 3, 4])
def test_a_unit_is_dropped_below_the_threshold_and_kept_at_it(block: int) -> None:
    # Random123's known answer for zeros; of other seeds and steps the words are the reference's, which has them all.
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    for threshold in (words[0], words[0] + 1, words[3], words[3] + 1, words[1], words[1] + 1):
        mask = Mask([0], block, torch.tensor([0, 0, threshold], device=DEVICE))
        out = [torch.empty(4 * block, device=DEVICE)]
        rows = TaskGrads([torch.ones(4 * block, device=DEVICE)], [0], 1)
        combine_tensors(rows, torch.ones(1, 1, device=DEVICE), out, mask)
        assert out[0].view(4, block).tolist() == [[float(word >= threshold)] * block for word in words]


@pytest.mark.parametrize(
    ("T", "dtype", "block"),
    [
        *((3, dtype, block) for dtype in DTYPES for block in (1, 128)),
        *((3, F32, block) for block in (2, 3, 100, 130, 8192)),
        *((3, BF16, block) for block in (2, 100)),
        (1, F32, 1),
        (9, F32, 128),
        (13, F32, 1),
        (13, BF16, 128),
    ],
)
def test_gramian(T: int, dtype: torch.dtype, block: int) -> None:
    check_gramian(problem(T, dtype, block))


@pytest.mark.parametrize(
    ("T", "dtype", "block"), [(9, BF16, 1), (13, F64, 3), (40, F32, 1), (40, BF16, 128), (70, F16, 1)]
)
def test_gramian_of_many_rows(T: int, dtype: torch.dtype, block: int) -> None:
    check_gramian(problem(T, dtype, block, Parameters([130, 90], [0, 0], 1, [0, 1 << 34])))


@pytest.mark.parametrize("pad", [0, 1])
@pytest.mark.parametrize("block", [1, 2, 3, 100, 128, 130, 512, 4096, 5000, 8192])
def test_combine(block: int, pad: int) -> None:
    """Tensors have several tiles: some units end within one, and some go on in the next."""
    parameters = PARAMETERS._replace(numels=[2 * TILE + 9, 7, 0, 5001, 130])
    check_combined(problem(3, F32, block, parameters, pad=pad))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 9])
def test_combine_of_any_dtype(T: int, dtype: torch.dtype) -> None:
    for block in (1, 4, 100):
        check_combined(problem(T, dtype, block))


@pytest.mark.parametrize("block", [1, 128])
@pytest.mark.parametrize("seed", [0, -1, -(1 << 63), (1 << 62) + 12345])
def test_any_bits_are_a_seed_and_a_step(seed: int, block: int) -> None:
    check_combined(problem(2, F32, block, Parameters([600], [0], 1, [1 << 40]), (seed, ~seed, HALF)))


def test_misaligned_rows_have_the_same_gramian() -> None:
    check_gramian(problem(3, F32, 1, pad=1))


@pytest.mark.parametrize("block", [1, 3, 128])
def test_a_threshold_of_nothing_keeps_every_bit_of_the_dense_results(block: int) -> None:
    given = problem(3, F32, block, state=(7, 8, 0))
    assert torch.equal(gramian_tensors(given.rows, given.mask), gramian_tensors(given.rows))
    w = torch.randn(PARAMETERS.n_segments, 3, device=DEVICE)
    masked, dense = ([torch.empty(numel, device=DEVICE) for numel in PARAMETERS.numels] for _ in range(2))
    combine_tensors(given.rows, w, masked, given.mask)
    combine_tensors(given.rows, w, dense)
    assert torch.equal(torch.cat(masked), torch.cat(dense))


@pytest.mark.parametrize("block", [1, 3, 128])
def test_a_threshold_of_everything_leaves_what_is_not_masked(block: int) -> None:
    given = problem(3, F32, block, state=(7, 8, ALL))
    assert not given.keep[: PARAMETERS.numels[0]].any()
    check_gramian(given)
    assert not gramian_tensors(given.rows, given.mask)[1:].any()
    check_combined(given)


@pytest.mark.parametrize("block", [1, 128])
@pytest.mark.parametrize("weight", [torch.inf, torch.nan])
def test_what_is_dropped_is_zero_under_any_weight(weight: float, block: int) -> None:
    given = problem(1, F32, block, Parameters([600], [0], 1, [0]), (1, 2, HALF))
    out = [torch.empty(600, device=DEVICE)]
    combine_tensors(given.rows, torch.full((1, 1), weight, device=DEVICE), out, given.mask)
    assert torch.equal(out[0].cpu() == 0, ~given.keep)


def test_bad_arguments_are_named() -> None:
    rows, out = TaskGrads([torch.ones(8, device=DEVICE)], [0], 1), [torch.ones(8, device=DEVICE)]
    state = torch.tensor([0, 0, HALF], device=DEVICE)
    with pytest.raises(ValueError, match="units must be multiples of 4 or negative, got 6"):
        gramian_tensors(rows, Mask([6], 1, state))
    for block in (0, (1 << 30) + 1):
        with pytest.raises(ValueError, match=f"block must be from 1 to 1073741824, got {block}"):
            combine_tensors(rows, torch.ones(1, 1, device=DEVICE), out, Mask([0], block, state))


def test_the_units_of_a_tile_fit_in_the_bits_of_one_number() -> None:
    """A tile that starts with the last element of a unit touches the most of them."""
    assert 1 + -(-(TILE - 1) // FEWEST_ONCE) <= 64
