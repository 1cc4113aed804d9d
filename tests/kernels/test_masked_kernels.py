"""The Triton kernels under gradient suppression against float64 closed forms over the entries the reference keeps.

Whatever is dropped is NaN here, and so is what the kernels leave unwritten: it is in no result.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
import torch
from gradkern.ops.schema import arithmetic_dtype
from torch import Tensor

from gradkern import reference
from gradkern.ops.layout import TILE
from tests import interpreter
from tests.tolerances import DTYPES, TOLERANCES, assert_near

pytest.importorskip("triton", reason="no Triton on this platform")
if (reason := interpreter.why_not()) and not torch.cuda.is_available():
    pytest.skip(reason, allow_module_level=True)

from gradkern.kernels.masks import FEWEST_ONCE
from gradkern.ops.triton import rows as cuda

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, in the interpreter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
HALF = 1 << 31
ALL = 1 << 32

# One tile on the fast road and shorter ones on the other; a tensor that is not masked; unit numbers of 33 and 35 bits.
NUMELS = [TILE + 9, 7, 0, 301, 130]
SEGMENTS = [1, 0, 0, 1, 0]
N_SEGMENTS = 3
UNITS = [8, -1, 4, (1 << 34) + 4, (1 << 32) - 64]


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with interpreter.unwritten_is_nan():
        yield


class Problem(NamedTuple):
    """Gradients as the operators take them, and as a float64 matrix with zeros for what is missing or dropped."""

    grads: list[Tensor | None]
    J: Tensor
    keep: Tensor
    mask: Tensor
    numels: list[int]
    units: list[int]


def kept(mask: Sequence[int], block: int, numels: Sequence[int], units: Sequence[int]) -> Tensor:
    """(P,) bool, of the reference's Philox; what is not masked is kept."""
    seed, step, threshold = mask
    parts = [
        reference.kept(seed % (1 << 64), step % (1 << 64), threshold / ALL, block, unit, numel)
        if unit >= 0
        else torch.ones(numel, dtype=torch.bool)
        for numel, unit in zip(numels, units, strict=True)
    ]
    return torch.cat(parts)


def problem(
    T: int,
    dtype: torch.dtype,
    block: int,
    mask: Sequence[int] = (-3, 1 << 40, int(0.45 * ALL)),
    numels: Sequence[int] = NUMELS,
    units: Sequence[int] = UNITS,
    pad: int = 0,
) -> Problem:
    """T rows of random tensors, each ``pad`` elements behind a boundary of 16 bytes; T > 1 rows have one missing."""
    keep = kept(mask, block, numels, units)
    J = torch.randn(T, sum(numels), dtype=F64).to(dtype)
    grads: list[Tensor | None] = []
    for row in J:
        for part, m_part in zip(row.split(list(numels)), keep.split(list(numels)), strict=True):
            buffer = torch.full((pad + len(part),), torch.nan, dtype=dtype, device=DEVICE)
            buffer[pad:] = torch.where(m_part, part, torch.nan)
            grads.append(buffer[pad:])
    J = torch.where(keep, J.double(), 0)
    if T > 1:
        k = len(numels) - 1
        grads[len(numels) + k] = None
        J[1, sum(numels[:k]) :] = 0
    return Problem(grads, J, keep, torch.tensor(mask, device=DEVICE), list(numels), list(units))


def assert_gramians(M: Tensor, J: Tensor, dtype: torch.dtype, numels: Sequence[int], segments: Sequence[int]) -> None:
    of = torch.repeat_interleave(torch.tensor(segments), torch.tensor(numels))
    assert M.dtype == arithmetic_dtype(dtype)
    for s, M_s in enumerate(M.cpu()):
        expected = J[:, of == s] @ J[:, of == s].T
        norms = expected.diagonal().sqrt()
        assert_near(M_s, expected, torch.outer(norms, norms), TOLERANCES[M.dtype])
        assert torch.equal(M_s, M_s.T)


def assert_combined(given: Problem, dtype: torch.dtype, block: int, segments: Sequence[int], n_segments: int) -> None:
    """``combine.masked`` of random weights: values, exact zeros, count."""
    T = len(given.J)
    w = torch.randn(n_segments, T, dtype=arithmetic_dtype(dtype))
    out = [torch.full((numel,), torch.nan, dtype=dtype, device=DEVICE) for numel in given.numels]
    count = cuda.combine_masked(given.grads, w.to(DEVICE), segments, given.units, block, given.mask, out)
    of = torch.repeat_interleave(torch.tensor(segments), torch.tensor(given.numels))
    weights = w.double().T[:, of]
    scale = (weights * given.J).abs().sum(0) + torch.finfo(dtype).smallest_normal
    result = torch.cat(out).cpu()
    assert_near(result, (weights * given.J).sum(0), scale, TOLERANCES[dtype])
    assert not result[~given.keep].any()
    masked = torch.repeat_interleave(torch.tensor(given.units) >= 0, torch.tensor(given.numels))
    assert count.dtype == torch.int64
    assert count.shape == ()
    assert int(count) == int((given.keep & masked).sum())


@pytest.mark.parametrize("block", [1, 3, 4])
def test_a_unit_is_dropped_below_the_threshold_and_kept_at_it(block: int) -> None:
    # Random123's known answer for zeros; of other seeds and steps the words are the reference's, which has them all.
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    for threshold in (words[0], words[0] + 1, words[3], words[3] + 1, words[1], words[1] + 1):
        mask = torch.tensor([0, 0, threshold], device=DEVICE)
        out = [torch.empty(4 * block, device=DEVICE)]
        grads = [torch.ones(4 * block, device=DEVICE)]
        cuda.combine_masked(grads, torch.ones(1, 1, device=DEVICE), [0], [0], block, mask, out)
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
    given = problem(T, dtype, block)
    M = cuda.gramian_masked(given.grads, SEGMENTS, N_SEGMENTS, UNITS, block, given.mask)
    assert_gramians(M, given.J, dtype, NUMELS, SEGMENTS)


@pytest.mark.parametrize(
    ("T", "dtype", "block"), [(9, BF16, 1), (13, F64, 3), (40, F32, 1), (40, BF16, 128), (70, F16, 1)]
)
def test_gramian_of_many_rows(T: int, dtype: torch.dtype, block: int) -> None:
    numels, units = [130, 90], [0, 1 << 34]
    given = problem(T, dtype, block, numels=numels, units=units)
    M = cuda.gramian_masked(given.grads, [0, 0], 1, units, block, given.mask)
    assert_gramians(M, given.J, dtype, numels, [0, 0])


@pytest.mark.parametrize("pad", [0, 1])
@pytest.mark.parametrize("block", [1, 2, 3, 100, 128, 130, 512, 4096, 5000, 8192])
def test_combine(block: int, pad: int) -> None:
    """Tensors of several tiles: units that end within one, and that go on in the next."""
    numels, units = [2 * TILE + 9, 7, 0, 5001, 130], UNITS
    given = problem(3, F32, block, numels=numels, units=units, pad=pad)
    assert_combined(given, F32, block, SEGMENTS, N_SEGMENTS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 9])
def test_combine_of_any_dtype(T: int, dtype: torch.dtype) -> None:
    for block in (1, 4, 100):
        assert_combined(problem(T, dtype, block), dtype, block, SEGMENTS, N_SEGMENTS)


@pytest.mark.parametrize("block", [1, 128])
@pytest.mark.parametrize("seed", [0, -1, -(1 << 63), (1 << 62) + 12345])
def test_any_bits_are_a_seed_and_a_step(seed: int, block: int) -> None:
    given = problem(2, F32, block, mask=(seed, ~seed, HALF), numels=[600], units=[1 << 40])
    assert_combined(given, F32, block, [0], 1)


def test_misaligned_rows_have_the_same_gramian() -> None:
    given = problem(3, F32, 1, pad=1)
    assert_gramians(
        cuda.gramian_masked(given.grads, SEGMENTS, N_SEGMENTS, UNITS, 1, given.mask), given.J, F32, NUMELS, SEGMENTS
    )


@pytest.mark.parametrize("block", [1, 3, 128])
def test_a_threshold_of_nothing_keeps_every_bit_of_the_dense_results(block: int) -> None:
    given = problem(3, F32, block, mask=(7, 8, 0))
    M = cuda.gramian_masked(given.grads, SEGMENTS, N_SEGMENTS, UNITS, block, given.mask)
    assert torch.equal(M, cuda.gramian_tensors(given.grads, SEGMENTS, N_SEGMENTS))
    w = torch.randn(N_SEGMENTS, 3, device=DEVICE)
    masked, dense = ([torch.empty(numel, device=DEVICE) for numel in NUMELS] for _ in range(2))
    count = cuda.combine_masked(given.grads, w, SEGMENTS, UNITS, block, given.mask, masked)
    cuda.combine_tensors(given.grads, w, SEGMENTS, dense)
    assert torch.equal(torch.cat(masked), torch.cat(dense))
    assert int(count) == sum(numel for numel, unit in zip(NUMELS, UNITS, strict=True) if unit >= 0)


@pytest.mark.parametrize("block", [1, 3, 128])
def test_a_threshold_of_everything_leaves_what_is_not_masked(block: int) -> None:
    given = problem(3, F32, block, mask=(7, 8, ALL))
    assert not given.keep[: NUMELS[0]].any()
    M = cuda.gramian_masked(given.grads, SEGMENTS, N_SEGMENTS, UNITS, block, given.mask)
    assert_gramians(M, given.J, F32, NUMELS, SEGMENTS)
    assert not M[1:].any()
    assert_combined(given, F32, block, SEGMENTS, N_SEGMENTS)


@pytest.mark.parametrize("block", [1, 128])
@pytest.mark.parametrize("weight", [torch.inf, torch.nan])
def test_what_is_dropped_is_zero_under_any_weight(weight: float, block: int) -> None:
    given = problem(1, F32, block, mask=(1, 2, HALF), numels=[600], units=[0])
    out = [torch.empty(600, device=DEVICE)]
    w = torch.full((1, 1), weight, device=DEVICE)
    cuda.combine_masked(given.grads, w, [0], [0], block, given.mask, out)
    assert torch.equal(out[0].cpu() == 0, ~given.keep)


def test_bad_arguments_are_named() -> None:
    grads, out = [torch.ones(8, device=DEVICE)], [torch.ones(8, device=DEVICE)]
    mask = torch.tensor([0, 0, HALF], device=DEVICE)
    with pytest.raises(ValueError, match="units must be multiples of 4 or negative, got 6"):
        cuda.gramian_masked(grads, [0], 1, [6], 1, mask)
    for block in (0, (1 << 30) + 1):
        with pytest.raises(ValueError, match=f"block must be from 1 to 1073741824, got {block}"):
            cuda.combine_masked(grads, torch.ones(1, 1, device=DEVICE), [0], [0], block, mask, out)


def test_the_units_of_a_tile_fit_in_the_bits_of_one_number() -> None:
    """A tile that starts with the last element of a unit touches the most of them."""
    assert 1 + -(-(TILE - 1) // FEWEST_ONCE) <= 64
