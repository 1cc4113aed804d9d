"""The Triton kernels against float64 closed forms: on the GPU where there is one, else in Triton's interpreter.

Everything the kernels leave unwritten is NaN here, and NaN is near nothing, so each comparison also shows that every
element was written.
"""

import mmap
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gradkern import reference
from gradkern.ops.arguments import TaskGrads
from gradkern.ops.dtypes import arithmetic_dtype
from gradkern.ops.layout import TILE
from gradkern.ops.offsets import column_bounds
from gradkern.tuning.forced import Forced
from tests import interpreter
from tests.tolerances import DTYPES, TOLERANCES, assert_near

pytest.importorskip("triton", reason="no Triton on this platform")
if (reason := interpreter.why_not()) and not torch.cuda.is_available():
    pytest.skip(reason, allow_module_level=True)

from gradkern.kernels import combine as combine_kernel
from gradkern.kernels import gramian as gramian_kernel
from gradkern.kernels import project as project_kernel
from gradkern.kernels import reduce
from gradkern.kernels.rows import Rows, Tiles
from gradkern.kernels.served import served
from gradkern.kernels.settings import OUTPUT_ROWS, PieceSetting
from gradkern.ops.triton.combine import combine, combine_tensors, project
from gradkern.ops.triton.gramian import gramian, gramian_tensors
from gradkern.ops.triton.methods import pcgrad

F32, F64 = torch.float32, torch.float64
# Every launch setting, with both its ends; 70 is put together from blocks. EDGES are where forms and dtypes part.
COUNTS = [1, 2, 3, 4, 5, 8, 9, 12, 13, 16, 17, 32, 33, 40, 64, 70]
EDGES = [8, 9, 13, 33, 64]
SIZES = [0, 1, 7, TILE - 1, TILE, TILE + 1, 3 * TILE + 5]
# Tensors of many sizes, those of a segment not next to each other, the last segment empty.
NUMELS = [1, 5000, 7, 0, TILE, 300, TILE + 1, 2]
SEGMENTS = [2, 0, 1, 0, 2, 0, 1, 1]
N_SEGMENTS = 4


@pytest.fixture
def device() -> torch.device:
    """The device of the kernels: Triton interprets or compiles, never both in one process."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with interpreter.unwritten_is_nan():
        yield


def matrix(T: int, P: int, dtype: torch.dtype, device: torch.device, pad: int = 0) -> Tensor:
    """Return (T, P), every row on a 16-byte boundary, where 128-bit loads are; or ``pad`` numbers after one."""
    pitch = -(-(pad + P) // 16) * 16
    J = torch.randn(T, pitch, dtype=torch.float64).to(dtype).to(device)[:, pad : pad + P]
    assert P == 0 or (J.data_ptr() % 16 == 0) == (pad == 0)
    return J


def tensors(J: Tensor, numels: list[int]) -> list[Tensor | None]:
    """Return the rows of ``J`` as a list of tensors, each in a storage of its own."""
    return [part.clone() for row in J for part in row.split(numels)]


def columns_of(segment: int) -> Tensor:
    """Return (P,) bool: the columns of a segment in the matrix of ``NUMELS``."""
    return torch.repeat_interleave(torch.tensor(SEGMENTS) == segment, torch.tensor(NUMELS))


def assert_gramian(M: Tensor, J: Tensor) -> None:
    expected = J.cpu().double() @ J.cpu().double().T
    norms = expected.diagonal().sqrt()
    assert M.dtype == arithmetic_dtype(J.dtype)
    # Products and sums are in arithmetic dtype however the rows are stored.
    assert_near(M.cpu(), expected, torch.outer(norms, norms), TOLERANCES[M.dtype])
    assert torch.equal(M, M.T)


def assert_product(out: Tensor, W: Tensor, J: Tensor) -> None:
    W, J = W.cpu().double(), J.cpu().double()
    # Below the smallest normal number of the dtype, float16's 6e-5 above all, the last place no longer shrinks.
    scale = W.abs() @ J.abs() + torch.finfo(out.dtype).smallest_normal
    assert_near(out.cpu(), W @ J, scale, TOLERANCES[out.dtype])


@pytest.mark.parametrize(
    ("T", "dtype"), [*((T, F32) for T in COUNTS), *((T, dtype) for T in EDGES for dtype in DTYPES if dtype != F32)]
)
def test_gramian_of_any_number_of_rows(T: int, dtype: torch.dtype, device: torch.device) -> None:
    # One tile on the fast road, one number on the other.
    J = matrix(T, TILE + 1, dtype, device)
    assert_gramian(gramian(J), J)


@pytest.mark.parametrize("pad", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [3, 13])
def test_gramian_of_any_size(T: int, dtype: torch.dtype, pad: int, device: torch.device) -> None:
    for P in SIZES:
        J = matrix(T, P, dtype, device, pad)
        assert_gramian(gramian(J), J)


@pytest.mark.parametrize("T", [3, 13])
def test_gramian_of_many_pieces(T: int, device: torch.device) -> None:
    """The pieces have several tiles, and are more than one block of the second stage takes."""
    J = matrix(T, 8 * TILE + 9, torch.float32, device)
    with Forced({served.key("pieces", T, 4): PieceSetting(3, 64)}):
        assert_gramian(gramian(J), J)
    partials = torch.randn(reduce.PIECES + 3, 6, device=device)
    M = torch.empty(2, 3, 3, device=device)
    bounds = torch.tensor([0, 1, reduce.PIECES + 3], device=device)
    reduce.reduce(partials, bounds, M).run(M.device)
    lower = torch.tril_indices(3, 3, device=device)
    first, second = M[:, lower[0], lower[1]]
    assert torch.equal(first, partials[0])
    assert_near(second, partials[1:].double().sum(0), partials.abs().sum(0), TOLERANCES[torch.float32])


@pytest.mark.parametrize("T", [2, 13])
def test_gramian_of_segments(T: int, device: torch.device) -> None:
    offsets = torch.tensor([0, 0, 5, 5, TILE + 3, 2 * TILE + 9, 2 * TILE + 9])
    J = matrix(T, int(offsets[-1]), torch.float32, device)
    M = gramian(J, offsets)
    for part, (a, b) in zip(M, pairwise(offsets.tolist()), strict=True):
        assert_gramian(part, J[:, a:b])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, in the interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [3, 13, 40])
def test_gramian_shows_what_is_not_finite(T: int, dtype: torch.dtype, value: float, device: torch.device) -> None:
    J = matrix(T, TILE, dtype, device)
    J[1, 17] = value
    M = gramian(J).cpu()
    bad = torch.zeros(T, T, dtype=torch.bool)
    bad[1] = bad[:, 1] = True
    assert torch.equal(~M.isfinite(), bad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 4, 6])
def test_combine(T: int, dtype: torch.dtype, device: torch.device) -> None:
    for P in SIZES:
        for pad in (0, 1):
            J = matrix(T, P, dtype, device, pad)
            w = torch.randn(T, dtype=arithmetic_dtype(dtype), device=device)
            out = combine(J, w)
            assert out.dtype == dtype
            assert_product(out, w, J)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("R", range(1, OUTPUT_ROWS + 2))
def test_project_to_any_number_of_rows(R: int, dtype: torch.dtype, device: torch.device) -> None:
    J = matrix(3, TILE + 1, dtype, device)
    W = torch.randn(R, 3, dtype=arithmetic_dtype(dtype), device=device)
    assert_product(project(J, W), W, J)


@pytest.mark.parametrize("pad", [0, 1])
@pytest.mark.parametrize("T", [1, 4, 9])
def test_project_of_any_size(T: int, pad: int, device: torch.device) -> None:
    for P in SIZES:
        J = matrix(T, P, torch.float32, device, pad)
        W = torch.randn(2, T, device=device)
        assert_product(project(J, W), W, J)


def test_combine_and_project_of_segments(device: torch.device) -> None:
    offsets = torch.tensor([0, 0, 5, 5, TILE + 3, 2 * TILE + 9])
    J = matrix(5, int(offsets[-1]), torch.float32, device)
    W = torch.randn(5, 3, 5, device=device)
    projected = project(J, W, offsets)
    combined = combine(J, W[:, 0], offsets)
    for s, (a, b) in enumerate(pairwise(offsets.tolist())):
        assert_product(projected[:, a:b], W[s], J[:, a:b])
        assert_product(combined[a:b], W[s, 0], J[:, a:b])


def test_combine_does_not_read_rows_of_weight_zero(device: torch.device) -> None:
    J = matrix(6, TILE + 5, torch.float32, device)
    w = torch.tensor([1.0, 0.0, -2.0, 0.0, 3.0, -0.0], device=device)
    expected = combine(J, w)
    J[w == 0] = torch.nan
    assert torch.equal(combine(J, w), expected)
    assert_product(expected, w[w != 0], J[w != 0])


def test_project_multiplies_by_zero_as_any_product_does(device: torch.device) -> None:
    J = matrix(2, TILE, torch.float32, device)
    J[1, 3] = torch.nan
    out = project(J, torch.tensor([[1.0, 0.0]], device=device))
    assert out[0].isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize(("T", "dtype"), [(3, torch.float32), (3, torch.float16), (13, torch.float16)])
def test_lists_of_tensors(T: int, dtype: torch.dtype, device: torch.device) -> None:
    """The tensors of a segment lie apart, and missing ones count as zeros."""
    P = sum(NUMELS)
    J = matrix(T, P, dtype, device)
    n = len(NUMELS)
    grads = tensors(J, NUMELS)
    missing = {(0, 1), (1, 4), *((t, 5) for t in range(T))}
    starts = np.cumsum([0, *NUMELS])
    for t, k in missing:
        grads[t * n + k] = None
        J[t, starts[k] : starts[k + 1]] = 0

    # No row has tensor 5, so nothing tells its size: it counts as zero wherever it is.
    rows = TaskGrads(grads, SEGMENTS, N_SEGMENTS)
    M = gramian_tensors(rows)
    w = torch.randn(N_SEGMENTS, T, device=device)
    out = [torch.full((size,), torch.nan, dtype=dtype, device=device) for size in NUMELS]
    combine_tensors(rows, w, out)
    combined = torch.cat(out)
    for s in range(N_SEGMENTS):
        columns = columns_of(s).to(device)
        assert_gramian(M[s], J[:, columns])
        assert_product(combined[columns], w[s], J[:, columns])


@pytest.mark.parametrize("T", [3, 13])
def test_lists_and_matrices_give_the_same_bits(T: int, device: torch.device) -> None:
    numels = [5, TILE, TILE + 3]
    J = matrix(T, sum(numels), torch.float32, device)
    offsets = torch.tensor([0, 5, TILE + 5, 2 * TILE + 8])
    rows = TaskGrads(tensors(J, numels), [0, 1, 2], 3)
    w = torch.randn(3, T, device=device)
    out = [torch.empty(size, device=device) for size in numels]
    combine_tensors(rows, w, out)
    assert torch.equal(torch.cat(out), combine(J, w, offsets))
    assert torch.equal(gramian_tensors(rows), gramian(J, offsets))


def test_permuted_tensors_are_read_as_flat_memory(device: torch.device) -> None:
    """All present tensors have equal strides, so any order of elements will do."""
    J = matrix(2, 24, torch.float32, device)
    rows = TaskGrads([row.view(4, 6).T for row in J], [0], 1)
    out = [torch.empty(4, 6, device=device).T]
    w = torch.randn(1, 2, device=device)
    assert_gramian(gramian_tensors(rows)[0], J)
    combine_tensors(rows, w, out)
    assert_product(out[0].T.reshape(1, 24), w, J)


@pytest.mark.parametrize("T", [3, 13])
def test_rows_may_overlap(T: int, device: torch.device) -> None:
    row = matrix(1, TILE, torch.float32, device)
    J = row.expand(T, TILE)
    assert_gramian(gramian(J), J)


def test_columns_may_be_expanded(device: torch.device) -> None:
    """Autograd hands such a matrix to a backward formula as the gradient of a sum."""
    J = torch.ones(2, 1, device=device).expand(2, 9)
    assert_gramian(gramian(J), J)


@pytest.mark.parametrize("T", [3, 40])
def test_the_same_input_gives_the_same_bits(T: int, device: torch.device) -> None:
    J = matrix(T, 3 * TILE, torch.float32, device)
    assert torch.equal(gramian(J), gramian(J.clone()))


def test_no_tensors_at_all(device: torch.device) -> None:
    rows = TaskGrads([None, None], [0], 1)
    with pytest.raises(ValueError, match="grads holds no tensor"):
        gramian_tensors(rows)
    out = [torch.full((5,), torch.nan, device=device)]
    combine_tensors(rows, torch.ones(1, 2, device=device), out)
    assert torch.equal(out[0], torch.zeros_like(out[0]))


# Beyond 2³¹ elements


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a sparse file for memory, which no GPU reads")
@pytest.mark.parametrize("T", [2, 13])
def test_addresses_have_64_bits(T: int, tmp_path: Path) -> None:
    """Rows are 4 GiB apart, and a tile starts 2³² elements into its row; only the pages touched take memory."""
    far, stride, P = 1 << 32, 1 << 30, 40
    with (tmp_path / "sparse").open("wb+") as file:
        file.truncate(4 * (far + T * stride))
        memory = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.float32)

    def piece(first: int, count: int) -> Tensor:
        return memory[first : first + count]

    J = torch.randn(T, P)
    for t in range(T):
        piece(far + t * stride, P).copy_(J[t])
    rows = Rows(piece(0, 1), stride, T, torch.float32, table=False)
    outs = Rows(piece(P, 1), stride, T, torch.float32, table=False)
    tiles = Tiles(torch.tensor([[0, far, P, 0]]), TILE)
    cpu = torch.device("cpu")

    partials = torch.empty(1, T * (T + 1) // 2)
    M = torch.empty(1, T, T)
    target = gramian_kernel.Target(tensor_cores=True, interpreted=True)
    gramian_kernel.gramian(rows, tiles, None, torch.tensor([[0, 1]]), partials, target).run(cpu)
    reduce.reduce(partials, torch.tensor([0, 1]), M).run(cpu)
    assert_gramian(M[0], J)

    W = torch.randn(1, T, T)
    project_kernel.project(rows, tiles, W, outs).run(cpu)
    projected = torch.stack([piece(far + t * stride + P, P) for t in range(T)])
    assert_product(projected, W[0], J)

    combine_kernel.combine(rows, tiles, None, W[:, 0].contiguous(), outs, None).run(cpu)
    assert_product(piece(far + P, P), W[0, 0], J)


# PCGrad


def test_pcgrad_of_many_tasks_is_the_loop_over_vectors(device: torch.device) -> None:
    """The tasks are more than the threads of a warp, in float32; ``test_method_kernels.py`` has fewer."""
    T = 33
    J = torch.randn(T, 7 * T, dtype=torch.float64)
    keys = torch.rand(1, T, T)
    C = pcgrad((J @ J.T).float()[None].to(device), keys.to(device), "all")[0].cpu().double()
    expected = torch.stack(reference.pcgrad(list(J), keys[0].argsort(dim=-1, stable=True).tolist()))
    # The loop is in float64; M is rounded to float32, which T projections pass on.
    assert_near(C @ J, expected, J.norm(dim=-1).max(), T * TOLERANCES[F32])


def test_pcgrad_of_one_order_for_all_segments_and_of_ties(device: torch.device) -> None:
    J = torch.randn(3, 5, 6, dtype=torch.float64)
    M = (J @ J.mT).to(device)
    C = pcgrad(M, torch.zeros(1, 5, 5, device=device), "all").cpu()
    for s in range(3):
        expected = torch.stack(reference.pcgrad(list(J[s]), [range(5)] * 5))
        assert_near(C[s] @ J[s], expected, J[s].norm(dim=-1).max(), TOLERANCES[torch.float64])


@pytest.mark.parametrize("value", [torch.nan, 0.0])
def test_pcgrad_never_projects_on_rows_of_nan_or_zero(value: float, device: torch.device) -> None:
    J = torch.randn(4, 5, dtype=torch.float64)
    M = J @ J.T
    M[1], M[:, 1] = value, value
    C = pcgrad(M[None].to(device), torch.zeros(1, 4, 4, device=device), "all")[0].cpu()
    others = [0, 2, 3]
    expected = torch.stack(reference.pcgrad(list(J[others]), [range(3)] * 3))
    assert_near(C[others][:, others] @ J[others], expected, J.norm(dim=-1).max(), TOLERANCES[torch.float64])
    assert C[1].tolist() == [0, 1, 0, 0]
    assert C[:, 1].tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("square", [0.0, torch.nan])
def test_pcgrad_never_divides_by_what_is_not_positive(square: float, device: torch.device) -> None:
    """The square of a tiny row underflows to zero while its dot product with a large one does not."""
    M = torch.tensor([[[1.0, -1e-30], [-1e-30, square]]], device=device)
    C = pcgrad(M, torch.zeros(1, 2, 2, device=device), "random")[0]
    assert C[0].tolist() == [1, 0]


# What the host does


def test_bad_arguments_are_named(device: torch.device) -> None:
    J = matrix(2, 6, torch.float32, device)
    w = torch.ones(3, device=device)
    with pytest.raises(ValueError, match=r"w must have shape \(2,\), got \(3,\)"):
        combine(J, w)
    with pytest.raises(ValueError, match=r"W must have shape \(3, 2\), got \(3, 3\)"):
        project(J, w.expand(3, 3))
    with pytest.raises(TypeError, match="grads must be of one dtype"):
        gramian_tensors(TaskGrads([J[0], J[1].half()], [0], 1))
    with pytest.raises(ValueError, match="order_keys must be"):
        pcgrad(J[None, :, :2], J, "all")


@pytest.mark.parametrize(
    ("offsets", "error"),
    [
        (torch.tensor([0, 6], dtype=torch.int32), TypeError),
        (torch.tensor([[0, 6]]), ValueError),
        (torch.tensor([], dtype=torch.int64), ValueError),
        (torch.tensor([1, 6]), ValueError),
        (torch.tensor([0, 5]), ValueError),
        (torch.tensor([0, 4, 3, 6]), ValueError),
        ([0, 6], TypeError),
    ],
)
def test_bad_offsets_are_named(offsets: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="offsets"):
        column_bounds(offsets, 6)
