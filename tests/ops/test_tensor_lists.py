"""The operators' zero-copy form: gradients of several tensors, read where they lie, as the matrix they stand for."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from gradkern import reference
from gradkern.ops import operators
from gradkern.ops.arguments import AdamWState, AdamWStep, Mask, TaskGrads
from gradkern.ops.registry import Operator
from tests.tolerances import DTYPES, TOLERANCES, assert_near

ops = torch.ops.gradkern

SHAPES = [(300, 17), (), (0,), (4096,), (2, 3, 5), (5000,)]
SEGMENTS = [1, 0, 1, 2, 0, 1]


def tensors(T: int, dtype: torch.dtype, device: torch.device, missing: bool) -> list[Tensor | None]:
    """T rows of one gradient per shape; some missing if asked for, of one shape all."""
    grads: list[Tensor | None] = [
        torch.randn(s, dtype=torch.float64).to(dtype).to(device) for _ in range(T) for s in SHAPES
    ]
    if missing:
        n = len(SHAPES)
        for t, k in [(0, 0), (1, 5), *((t, 3) for t in range(T))]:
            grads[t * n + k] = None
    return grads


def dense_rows(grads: list[Tensor | None], members: list[int]) -> list[Tensor]:
    """One vector per task: its gradients for the tensors ``members``, zeros for missing ones."""
    n = len(SHAPES)
    return [
        torch.cat(
            [
                torch.zeros(SHAPES[k]).reshape(-1) if (g := grads[t + k]) is None else g.cpu().reshape(-1).double()
                for k in members
            ]
        )
        for t in range(0, len(grads), n)
    ]


def members(s: int) -> list[int]:
    return [k for k, segment in enumerate(SEGMENTS) if segment == s]


def poisoned(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return [torch.full(s, float("nan"), dtype=dtype, device=device) for s in SHAPES]


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gramian(dtype: torch.dtype, missing: bool, device: torch.device) -> None:
    grads = tensors(4, dtype, device, missing)
    M = operators.gramian_tensors(TaskGrads(grads, SEGMENTS, 4))
    assert M.shape == (4, 4, 4)
    assert torch.equal(M[3].cpu(), torch.zeros(4, 4))  # a segment without tensors
    for s in range(3):
        expected = reference.gramian(dense_rows(grads, members(s)))
        norms = expected.diagonal().sqrt()
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        assert_near(M[s].cpu(), expected, torch.outer(norms, norms), TOLERANCES[sums])


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_combine(dtype: torch.dtype, missing: bool, device: torch.device) -> None:
    grads = tensors(3, dtype, device, missing)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    w = torch.randn(3, 3, dtype=work)
    w[1, 2] = 0
    out = poisoned(dtype, device)
    operators.combine_tensors(TaskGrads(grads, SEGMENTS, 3), w.to(device), out)
    for k, s in enumerate(SEGMENTS):
        rows = dense_rows(grads, [k])
        expected = reference.combine(rows, w[s].tolist())
        size = reference.combine([row.abs() for row in rows], w[s].abs().tolist())
        assert_near(out[k].cpu().reshape(-1), expected, size, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [2, 3, 8, 17])
def test_the_same_bits_as_the_matrix_of_the_same_layout(T: int, dtype: torch.dtype, device: torch.device) -> None:
    """Tensor k is segment k, and the matrix's offsets cut it where the tensors end."""
    numels = [5100, 1, 0, 4096, 30, 9000]
    offsets = torch.tensor([0, *torch.tensor(numels).cumsum(0).tolist()])
    J = torch.randn(T, int(offsets[-1]), device=device).to(dtype)
    grads = [part.clone() for row in J for part in row.split(numels)]
    segments = list(range(len(numels)))
    M = ops.gramian(J, offsets)
    assert torch.equal(operators.gramian_tensors(TaskGrads(grads, segments, len(numels))), M)
    w = M[:, 0].contiguous()
    out = [torch.full((n,), float("nan"), dtype=dtype, device=device) for n in numels]
    operators.combine_tensors(TaskGrads(grads, segments, len(w)), w, out)
    expected = ops.combine(J, w, offsets)
    if device.type == "cpu":  # the BLAS sums the rows of a matrix in an order of its own
        assert_near(torch.cat(out), expected, (w.abs().max() * J.abs().sum(0).max()).item(), TOLERANCES[dtype])
    else:
        assert torch.equal(torch.cat(out), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "P"), [(3, 800_000), (4, 5_000), (13, 90_001), (40, 26_304), (64, 54_480)])
def test_on_the_cpu_a_segment_of_several_tensors_has_the_bits_of_the_matrix(T: int, P: int, dtype: torch.dtype) -> None:
    """In one block of gathered columns or in several, the last of them short; chunks reach from tensor to tensor."""
    J = torch.randn(T, P).to(dtype)
    grads = [part.clone() for row in J for part in row.split([P // 3, 7, P - P // 3 - 7])]
    assert torch.equal(operators.gramian_tensors(TaskGrads(grads, [0, 0, 0], 1))[0], ops.gramian(J))


@settings(max_examples=60)
@given(st.integers(1, 9), st.lists(st.integers(0, 5000), min_size=1, max_size=6), st.sampled_from(DTYPES), st.data())
def test_any_layout_has_the_bits_of_the_matrix_cut_alike(
    T: int, numels: list[int], dtype: torch.dtype, data: st.DataObject
) -> None:
    """A gradient that is missing is a row of zeros."""
    J = torch.randn(T, sum(numels)).to(dtype)
    grads: list[Tensor | None] = [part.clone() for row in J for part in row.split(numels)]
    missing = data.draw(st.sets(st.integers(0, len(grads) - 1), max_size=len(grads) - 1))
    starts = [0, *torch.tensor(numels).cumsum(0).tolist()]
    for i in missing:
        t, k = divmod(i, len(numels))
        grads[i] = None
        J[t, starts[k] : starts[k + 1]] = 0
    M = operators.gramian_tensors(TaskGrads(grads, list(range(len(numels))), len(numels)))
    assert torch.equal(M, ops.gramian(J, torch.tensor(starts)))


def test_columns_in_any_memory_order(device: torch.device) -> None:
    """Tensors of equal strides are read as flat memory, whatever the strides are."""
    grads = [torch.randn(4, 3, 5, 5, device=device).to(memory_format=torch.channels_last) for _ in range(2)]
    out = [torch.empty_like(grads[0])]
    operators.combine_tensors(TaskGrads(grads, [0], 1), torch.tensor([[2.0, -1.0]], device=device), out)
    assert_near(out[0], 2.0 * grads[0] - grads[1], 10.0, TOLERANCES[torch.float32])
    M = operators.gramian_tensors(TaskGrads(grads, [0], 1))[0]
    assert_near(M[0, 1].cpu(), (grads[0] * grads[1]).double().sum().cpu(), 300.0, TOLERANCES[torch.float32])


def test_operators_keep_torchs_contract(device: torch.device) -> None:
    """Masked and not; ``kept`` is one of the tensors that they write to."""
    grads = tensors(3, torch.float32, device, missing=True)
    mask = Mask([0, -1, 8, 16, -1, 1 << 20], 5, torch.tensor([3, 1, 1 << 31], device=device))
    w, kept = torch.randn(4, 3, device=device), torch.zeros((), dtype=torch.int64, device=device)
    moments = [torch.rand(s, device=device) for _ in range(2) for s in SHAPES]
    state = AdamWState(
        [torch.randn(s, device=device) for s in SHAPES], moments, [torch.ones((), device=device) for _ in SHAPES]
    )
    step = AdamWStep(None, torch.tensor(0.5, device=device), [0.1, 0.9, 0.99, 0.0, 1e-8])
    rows, out = TaskGrads(grads, SEGMENTS, 4), [torch.zeros(s, device=device) for s in SHAPES]
    for last in ((), (mask,)):
        check(operators.gramian_tensors, rows, *last)
    for last in ((), (mask, kept)):
        check(operators.combine_tensors, rows, w, out, *last)
        check(operators.adamw, rows, w, state, step, *last)


def check(operator: Operator[..., Any], *args: object) -> None:
    opcheck(operator.overload, tuple(operator.flattened(*args)))
