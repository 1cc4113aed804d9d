"""The same numbers give the same bits on the CPU, and what that relies on. ``.ci/mkl`` runs this both ways of MKL's.

Nothing here is compared with another processor's results: in which order a chunk is summed is its BLAS's own affair.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

import gradkern as gk
from gradkern.ops import operators
from gradkern.ops.arguments import TaskGrads
from gradkern.ops.pytorch import chunks, combination, observed
from gradkern.ops.pytorch.chunks import LINE, LONGEST, batch, cut, error_bound, tiles
from gradkern.ops.pytorch.observed import products_of
from tests.tolerances import DTYPES

ops = torch.ops.gradkern
CPU = torch.device("cpu")

ROWS = [1, 2, 3, 4, 5, 8, 13, 16, 17, 20, 33, 40, 64, 100]
SIZES = [1, 2, 7, 31, 100, 1000, 2047, 2048, 4097, 16_384, 50_000, 90_001, 300_003, 700_001]
"""A single chunk and its neighbours; a matrix in one block and in several, with and without a rest."""
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
THREADS = [1, 2, 3, 8]
MOST = 1_000_000
"""Numbers of a matrix, to be done with all of this in less than a minute."""


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def matrices(T: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Return matrices of T rows, and weights for them."""
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    for P in SIZES:
        if T * P <= MOST:
            yield torch.randn(T, P).to(dtype), torch.randn(T, dtype=arithmetic)


def placed(J: Tensor, offset: int, gap: int) -> Tensor:
    """The same numbers ``offset`` elements behind a line's start, with ``gap`` elements between the rows."""
    T, P = J.shape
    memory = J.new_empty(T * (P + gap) + offset + LINE)
    start = -memory.data_ptr() % LINE // J.element_size() + offset
    return memory[start:].as_strided((T, P), (P + gap, 1)).copy_(J)


def results(J: Tensor, w: Tensor) -> list[Tensor]:
    combined = gk.combine(J, w), gk.combine(J, w, out=J.new_full(J.shape[1:], torch.nan))
    return [gk.gramian(J), *combined, gk.project(J, torch.stack([w, w.flip(0)]))]


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        different = a.view(BITS[a.element_size()]) != b.view(BITS[b.element_size()])  # -0 is another number than 0
        assert not different.any(), f"{int(different.sum())} of {a.numel()} numbers differ"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", ROWS)
def test_neither_addresses_nor_gaps_change_a_bit(T: int, dtype: torch.dtype) -> None:
    for J, w in matrices(T, dtype):
        expected = results(J, w)
        for offset, gap in [(0, 1), (0, 16), (1, 0), (3, 5), (8, 8), (16, 3)]:
            assert_same_bits(results(placed(J, offset, gap), w), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", ROWS)
def test_a_list_of_tensors_has_the_bits_of_the_matrix(T: int, dtype: torch.dtype) -> None:
    for J, w in matrices(T, dtype):
        P = J.shape[1]
        lengths = [P // 3, min(7, P - P // 3), P - P // 3 - min(7, P - P // 3)]
        pieces = [piece.clone() for row in J for piece in row.split(lengths)]
        out = [torch.empty(n, dtype=dtype) for n in lengths]
        operators.combine_tensors(TaskGrads(pieces, [0, 0, 0], 1), w.unsqueeze(0), out)
        assert_same_bits(
            [operators.gramian_tensors(TaskGrads(pieces, [0, 0, 0], 1))[0], torch.cat(out)],
            [gk.gramian(J), gk.combine(J, w)],
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", ROWS)
def test_the_number_of_threads_changes_no_bit(T: int, dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    for J, w in matrices(T, dtype):
        expected = results(J, w)
        moved = placed(J, 3, 1)
        for n in THREADS:
            threads(n)
            assert_same_bits(results(J, w), expected)
            assert_same_bits(results(moved, w), expected)


def test_zeros_have_the_same_sign_in_every_layout() -> None:
    J, w = torch.zeros(3, 5000), -torch.rand(3)
    J[:, ::2] = torch.rand(3, 2500)
    J[1, 1::4] = -0.0
    out = [torch.empty(5000)]
    operators.combine_tensors(TaskGrads(list(J), [0], 1), w.unsqueeze(0), out)
    for layout in (placed(J, 0, 0), placed(J, 1, 1)):
        assert_same_bits([gk.combine(layout, w)], out)


def test_a_gramian_is_symmetric_to_the_bit() -> None:
    for T in ROWS:
        for P in (30, 1000, 30_000):
            M = gk.gramian(torch.randn(T, P, dtype=torch.float64))
            assert_same_bits([M], [M.mT.contiguous()])


def test_rows_that_are_two_billion_numbers_apart() -> None:
    """More than a BLAS counts in 32 bits. The memory between the rows is never touched."""
    J = torch.randn(2, 300_000)
    expected = gk.gramian(J)
    for stride in (2**31 - 1, 2**31):
        try:
            memory = torch.empty(stride + J.shape[1])
        except RuntimeError:
            pytest.skip("this machine gives out no 8 GB of memory, not even unused")
        assert_same_bits([gk.gramian(memory.as_strided(J.shape, (stride, 1)).copy_(J))], [expected])
        del memory


def test_the_callers_modes_change_no_bit() -> None:
    """Derivatives are around the operators; and what they keep from call to call is made in no mode of the caller's."""
    J, w = torch.randn(5, 8192), torch.randn(5)
    combination._bags.cache_clear()
    with torch.inference_mode():
        expected = [ops.gramian(J), ops.combine(J, w), ops.project(J, w[None])]
    J.requires_grad_()
    actual = [ops.gramian(J), ops.combine(J, w), ops.project(J, w[None])]
    assert_same_bits([result.detach() for result in actual], expected)


def test_load_changes_no_bit() -> None:
    """Four threads take turns on two cores, each with work for all of them."""
    J, w = torch.randn(5, 400_000), torch.randn(5)
    expected = results(J, w)
    found: list[list[Tensor]] = []

    def work() -> None:
        found.extend(results(placed(J, 1, 1), w) for _ in range(10))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 40
    for each in found:
        assert_same_bits(each, expected)


@pytest.mark.parametrize("order", [[0, 1, 2], None])
@pytest.mark.parametrize("method", [gk.PCGrad, gk.GradVac])
def test_methods_have_the_same_bits_on_a_matrix_anywhere(
    method: Callable[..., gk.Aggregator], order: list[int] | None, threads: Callable[[int], None]
) -> None:
    J = torch.randn(3, 90_001)

    def update(J: Tensor) -> Tensor:
        torch.manual_seed(1)
        return method(order=order)(J)

    expected = update(J)
    for n in THREADS:
        threads(n)
        assert_same_bits([update(placed(J, n, n))], [expected])


@pytest.mark.parametrize("fused", [False, True])
def test_a_training_step_has_the_same_bits_by_any_number_of_threads(
    fused: bool, threads: Callable[[int], None]
) -> None:
    """From the same gradients: those of a forward pass may change by the number of threads, so there is none here."""

    def train(n: int) -> Tensor:
        threads(n)
        torch.manual_seed(0)
        params = [torch.randn(300, 211).requires_grad_(), torch.randn(77_777).requires_grad_()]
        slopes = [[torch.randn_like(p) for p in params] for _ in range(3)]
        inner = gk.optim.AdamW(params) if fused else torch.optim.AdamW(params, fused=True)
        opt = gk.SurgeryOptimizer(inner, gk.GradVac(), suppression=gk.Suppression(0.3, seed=1))
        for _ in range(3):
            losses = [sum((p * s).sum() for p, s in zip(params, of_task, strict=True)) for of_task in slopes]
            if fused:
                opt.update(losses)
            else:
                opt.zero_grad()
                opt.backward(losses)
                opt.step()
        return torch.cat([p.detach().reshape(-1) for p in params])

    expected = train(1)
    for n in THREADS[1:]:
        assert torch.equal(train(n), expected)


# What the bits rely on.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("T", ROWS)
def test_a_product_comes_out_alike_in_any_batch(T: int, dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    """However many threads there are, and wherever in a batch of however many it stands."""
    for width in (16, 500, 1600, LONGEST):
        rows = torch.randn(T, 24 * width, dtype=dtype)
        for some, others in tiles(T):
            found: dict[int, Tensor] = {}
            for n in (*THREADS, 16):
                threads(n)
                for count in (1, 2, 3, 24):
                    X, counted = batch(rows, width, count)
                    assert len(X) == max(2, count)
                    products = products_of(X[:, some], X[:, others])[:counted]
                    for i, M in enumerate(products):
                        assert torch.equal(found.setdefault(i, M), M), (width, n, count, i)


def test_products_that_threads_share_are_computed_among_many(
    monkeypatch: pytest.MonkeyPatch, threads: Callable[[int], None]
) -> None:
    """A BLAS that sums the other way round where products are fewer than threads."""
    real = torch.bmm
    J = torch.randn(3, 10_000)

    def bmm(X: Tensor, Y: Tensor, **options: Tensor) -> Tensor:
        shared = len(X) < torch.get_num_threads()
        return real(X.flip(2), Y.flip(1), **options) if shared else real(X, Y, **options)

    expected = gk.gramian(J)
    monkeypatch.setattr(torch, "bmm", bmm)
    observed._not_shared.cache_clear()
    for n in (2, 3, 6, 8):
        threads(n)
        assert torch.equal(gk.gramian(J), expected)
    assert not torch.equal(bmm(J[None, :, :2000], J[None, :, :2000].mT), real(J[None, :, :2000], J[None, :, :2000].mT))
    observed._not_shared.cache_clear()


def test_pytorchs_allocator_aligns_to_lines() -> None:
    """Scratch memory needs no more than to be asked for."""
    held = [torch.empty(n, dtype=dtype) for n in (1, 7, 100, 5000, 1 << 20, 1 << 23) for dtype in DTYPES]
    assert all(memory.data_ptr() % LINE == 0 for memory in held)


@pytest.mark.parametrize("T", [1, 2, 5, 17, 40])
def test_rows_in_place_have_the_bits_of_copies(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ``observed`` answers changes what is copied, and no bit."""
    J = torch.randn(T, 300_003)
    expected = gk.gramian(J)
    monkeypatch.setattr("gradkern.ops.pytorch.gramian.in_place", lambda *_: False)
    monkeypatch.setattr("gradkern.ops.pytorch.gramian.lies_as_scratch", lambda *_: False)
    assert torch.equal(gk.gramian(J), expected)
    few = J[:, :6000].contiguous()
    copied = gk.gramian(few)
    monkeypatch.undo()
    assert torch.equal(gk.gramian(few), copied)


def test_another_order_of_summation_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A BLAS that sums rows the other way round where they do not start on a line."""
    real = torch.bmm

    def bmm(X: Tensor, Y: Tensor, **options: Tensor) -> Tensor:
        turned = X.data_ptr() % LINE != 0
        return real(X.flip(2), Y.flip(1), **options) if turned else real(X, Y, **options)

    monkeypatch.setattr(torch, "bmm", bmm)
    observed._same_order.cache_clear()
    J = torch.randn(3, 200_000)
    whole = cut(3, 200_000, 4)
    assert observed.in_place(placed(J, 0, 0), whole, torch.float32)
    assert not observed.in_place(placed(J, 1, 0), whole, torch.float32)
    assert torch.equal(gk.gramian(placed(J, 1, 0)), gk.gramian(placed(J, 0, 0)))
    observed._same_order.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_combination_by_other_means_has_the_bits_that_its_terms_have(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row by row in place of bags of rows; and multiplied and added apart, each rounded by itself, where PyTorch's
    vectors and its single elements do not agree."""
    J, w = torch.randn(5, 12_000, dtype=dtype), torch.randn(5, dtype=dtype)
    expected = gk.combine(J, w)
    monkeypatch.setattr(combination, "bags_agree", lambda _: False)
    assert torch.equal(gk.combine(J, w), expected)
    monkeypatch.setattr(combination, "additions_agree", lambda _: False)
    total = 0.0
    for row, weight in zip(J.numpy(), w.numpy(), strict=True):
        total = total + row * weight
    assert torch.equal(gk.combine(J, w), torch.from_numpy(total))


# How far results are from the truth.


def constant(T: int, P: int) -> Tensor:
    """All terms alike, so that all roundings of a running sum go the same way."""
    return torch.full((T, P), 0.1)


def positive(T: int, P: int) -> Tensor:
    """16-bit numbers of one sign, whose products are exact."""
    return torch.rand(T, P).bfloat16().float()


def falling(T: int, P: int) -> Tensor:
    """Large terms first."""
    return torch.logspace(3, -3, P).expand(T, P).contiguous()


@pytest.mark.parametrize("make", [constant, positive, falling, torch.randn])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 2, 3, 5, 17, 40])
def test_a_gramian_keeps_its_bound(T: int, dtype: torch.dtype, make: Callable[[int, int], Tensor]) -> None:
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    wider = np.longdouble if dtype == torch.float64 else np.float64
    if np.finfo(wider).eps > torch.finfo(arithmetic).eps / 1000:
        pytest.skip("this machine has no floats longer than float64 to compare with")
    for P in (1, 100, LONGEST, 2 * LONGEST + 1, 70_001):
        J = make(T, P).to(dtype)
        rows = J.double().numpy().astype(wider)
        exact, of_terms = rows @ rows.T, abs(rows) @ abs(rows).T
        error = abs(gk.gramian(J).numpy() - exact)
        bound = error_bound(T, P, arithmetic)
        assert bool((error <= bound * of_terms).all()), (P, float((error / of_terms).max()), bound)


def test_the_bound_counts_what_is_added() -> None:
    """2048 columns in a chunk at most, and a tree over the chunks."""
    half = 2.0**-24
    assert error_bound(3, 1, torch.float32) == (1 + 0 + 1) * half
    assert error_bound(3, 1000, torch.float32) == (500 + 1 + 1) * half
    assert error_bound(3, 1_000_000, torch.float32) == (1600 + 10 + 1) * half  # 625 chunks
    assert error_bound(3, 10**9 + 1, torch.float64) <= (LONGEST + 20) * 2.0**-53


@pytest.mark.parametrize("T", ROWS)
def test_a_cut_covers_all_columns_once(T: int) -> None:
    for itemsize, P in product((4, 8), [*SIZES, 10**8, 10**9 + 7]):
        of_all = cut(T, P, itemsize)
        assert of_all.width * of_all.chunks + of_all.rest == P
        assert of_all.width <= LONGEST
        assert of_all.rest <= LONGEST
        assert sum(columns for columns, _ in of_all.blocks) == P
        assert all(columns <= stride for columns, stride in of_all.blocks)
        assert of_all.group >= 1


def test_groups_of_products_are_added_up_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """More products than may wait at once, which takes a billion columns of two rows."""
    monkeypatch.setattr(chunks, "PARTIALS", 64)
    cut.cache_clear()
    J = torch.randint(-8, 9, (3, 400_001)).float()  # all sums are exact
    pieces = [piece.clone() for row in J for piece in row.split([399_990, 11])]
    assert cut(3, 400_001, 4).group < cut(3, 400_001, 4).chunks
    assert torch.equal(gk.gramian(J).double(), J.double() @ J.double().T)
    assert torch.equal(operators.gramian_tensors(TaskGrads(pieces, [0, 0], 1))[0], gk.gramian(J))
    cut.cache_clear()


# What users may have set.


def test_settings_of_pytorchs_change_no_bit() -> None:
    J, w = torch.randn(5, 90_001), torch.randn(5)
    expected = results(J, w)
    with torch.backends.mkldnn.flags(enabled=False):
        assert_same_bits(results(placed(J, 1, 0), w), expected)
    torch.use_deterministic_algorithms(True)
    try:
        assert_same_bits(results(placed(J, 1, 0), w), expected)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float64)
    try:
        assert_same_bits(results(placed(J, 1, 0), w), expected)
    finally:
        torch.set_default_dtype(torch.float32)


DIGEST = """
import hashlib, torch, gradkern as gk
torch.manual_seed(0)
digest = hashlib.sha256()
for T, P in ((2, 300_001), (3, 1000), (5, 70_001), (17, 20_000), (40, 9_000)):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        J, w = torch.randn(T, P, dtype=torch.float64).to(dtype), torch.randn(T)
        moved = torch.empty(T * (P + 1) + 1, dtype=dtype)[1:].as_strided((T, P), (P + 1, 1)).copy_(J)
        exact, of_terms = J.double() @ J.double().T, J.double().abs() @ J.double().abs().T
        M = gk.gramian(J)
        assert torch.equal(gk.gramian(moved), M), (T, P, dtype)
        assert torch.equal(gk.combine(moved, w), gk.combine(J, w)), (T, P, dtype)
        assert ((M.double() - exact).abs() <= 3e-4 * of_terms).all(), (T, P, dtype)
        for result in (M, gk.combine(J, w), gk.PCGrad(order=range(T))(J)):
            digest.update(result.view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def digest(**environment: str) -> str:
    """Of results in a process of its own, which asserts what has to hold within it."""
    run = subprocess.run(
        [sys.executable, "-c", DIGEST], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.strip()


def test_processes_with_other_numbers_of_threads_agree() -> None:
    expected = digest()
    assert len(expected) == 64
    assert digest(OMP_NUM_THREADS="1") == expected
    assert digest(OMP_NUM_THREADS="3", MKL_DYNAMIC="TRUE") == expected
    assert digest(MKL_NUM_THREADS="1") == expected


@pytest.mark.parametrize(
    "environment",
    [{"ATEN_CPU_CAPABILITY": "default"}, {"ATEN_CPU_CAPABILITY": "avx2"}, {"MKL_CBWR": "COMPATIBLE"}],
    ids=lambda environment: "=".join(next(iter(environment.items()))),
)
def test_under_other_instructions_bits_hold_too(environment: dict[str, str]) -> None:
    """They may be others, but twice the same ones, wherever the numbers lie."""
    assert digest(**environment) == digest(**environment, OMP_NUM_THREADS="1")
