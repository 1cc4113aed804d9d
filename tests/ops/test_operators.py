"""Gramian, combination and projection of a matrix, on every device, against the reference."""

import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import gradkern as gk
from gradkern import reference
from tests.tolerances import DTYPES, TOLERANCES, assert_near

# One chunk, its neighbours, the longest sum in one product, many chunks with and without a rest, and more than one
# block of 16-bit columns.
SIZES = [0, 1, 7, 2047, 2048, 4095, 4096, 4097, 16_384, 70_001]
OFFSETS = [None, [0, 5, 5, 4096, 9000]]


def matrix(T: int, P: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A (T, P) matrix whose rows lie apart, so that a row stride taken for P shows."""
    return torch.randn(T, P + 3, dtype=torch.float64).to(dtype).to(device)[:, :P]


def columns(J: Tensor, offsets: list[int] | None) -> list[Tensor]:
    return [J.cpu()] if offsets is None else [J[:, a:b].cpu() for a, b in pairwise(offsets)]


def as_tensor(offsets: list[int] | None) -> Tensor | None:
    return None if offsets is None else torch.tensor(offsets)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 2, 3, 8, 13, 40])
def test_gramian_is_the_dot_products(T: int, dtype: torch.dtype, device: torch.device) -> None:
    for P in SIZES:
        J = matrix(T, P, dtype, device)
        M = gk.gramian(J)
        expected = reference.gramian(J.cpu())
        norms = expected.diagonal().sqrt()
        assert M.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert M.device == J.device
        assert_near(M.cpu(), expected, torch.outer(norms, norms), _sum(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gramian_of_segments(dtype: torch.dtype, device: torch.device) -> None:
    J = matrix(3, 9000, dtype, device)
    M = gk.gramian(J, torch.tensor(OFFSETS[1]))
    assert M.shape == (4, 3, 3)
    for part, block in zip(M, columns(J, OFFSETS[1]), strict=True):
        expected = reference.gramian(block)
        norms = expected.diagonal().sqrt()
        assert_near(part.cpu(), expected, torch.outer(norms, norms), _sum(dtype))


@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_combine_is_the_weighted_sum(dtype: torch.dtype, offsets: list[int] | None, device: torch.device) -> None:
    J = matrix(5, 9000, dtype, device)
    w = torch.randn(5) if offsets is None else torch.randn(4, 5)
    w[..., 2] = 0
    out = gk.combine(J, w.to(device), as_tensor(offsets))
    blocks = columns(J, offsets)
    expected = [reference.combine(b, ws.tolist()) for b, ws in zip(blocks, w.reshape(-1, 5), strict=True)]
    size = [reference.combine(b.abs(), ws.abs().tolist()) for b, ws in zip(blocks, w.reshape(-1, 5), strict=True)]
    assert out.dtype == dtype
    assert_near(out.cpu(), torch.cat(expected), torch.cat(size), TOLERANCES[dtype])


@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_project_is_the_matrix_product(dtype: torch.dtype, offsets: list[int] | None, device: torch.device) -> None:
    J = matrix(4, 9000, dtype, device)
    W = torch.randn(3, 4) if offsets is None else torch.randn(4, 3, 4)
    out = gk.project(J, W.to(device), as_tensor(offsets))
    blocks = columns(J, offsets)
    expected = [reference.project(b, Ws.tolist()) for b, Ws in zip(blocks, W.reshape(-1, 3, 4), strict=True)]
    size = [reference.project(b.abs(), Ws.abs().tolist()) for b, Ws in zip(blocks, W.reshape(-1, 3, 4), strict=True)]
    assert out.dtype == dtype
    assert_near(out.cpu(), torch.cat(expected, 1), torch.cat(size, 1), TOLERANCES[dtype])


def test_the_operators_themselves_take_any_column_stride(device: torch.device) -> None:
    """The functions copy it first; a derivative or a caller of torch.ops may still hand such a matrix over."""
    J = torch.randn(9000, 8, device=device).T
    expected = reference.gramian(J.cpu())
    norms = expected.diagonal().sqrt()
    assert_near(torch.ops.gradkern.gramian(J).cpu(), expected, torch.outer(norms, norms), _sum(torch.float32))
    w = torch.randn(8, device=device)
    size = reference.combine(J.cpu().abs(), w.abs().tolist())
    combined = torch.ops.gradkern.combine(J, w)
    assert_near(combined.cpu(), reference.combine(J.cpu(), w.tolist()), size, TOLERANCES[torch.float32])


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "columns after columns": lambda J: J.T.contiguous().T,
    "every other column": lambda J: J.repeat_interleave(2, 1)[:, ::2],
    "one column, repeated": lambda J: J[:, :1].expand(-1, J.shape[1]),
}


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("offsets", [None, [0, 40, 90]])
def test_a_matrix_of_any_strides_is_as_its_copy(strides: str, offsets: list[int] | None, device: torch.device) -> None:
    X = STRIDES[strides](torch.randn(3, 90, device=device))
    assert X.stride(1) != 1
    copy, of = X.contiguous(), as_tensor(offsets)
    w = torch.randn(3, device=device) if of is None else torch.randn(2, 3, device=device)
    W = torch.randn(2, 3, device=device) if of is None else torch.randn(2, 2, 3, device=device)
    assert torch.equal(gk.gramian(X, of), gk.gramian(copy, of))
    assert torch.equal(gk.combine(X, w, of), gk.combine(copy, w, of))
    assert torch.equal(gk.project(X, W, of), gk.project(copy, W, of))
    out = torch.empty(90, device=device)
    assert gk.combine(X, w, of, out=out) is out
    assert torch.equal(out, gk.combine(copy, w, of))


def test_a_matrix_of_any_strides_has_a_derivative() -> None:
    given = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda X: gk.gramian(X.T), given)
    assert torch.autograd.gradcheck(lambda X: gk.combine(X.T, w), given)


def test_out_may_not_lie_in_a_matrix_that_is_copied() -> None:
    memory = torch.ones(5, 3)
    with pytest.raises(ValueError, match="out must share no memory with J"):
        gk.combine(memory.T, torch.ones(3), out=memory.view(15)[4:9])
    with pytest.raises(ValueError, match="out must share no memory with J"):
        gk.PCGrad()(memory.T, out=memory.view(15)[4:9])
    assert torch.equal(memory, torch.ones(5, 3))


def test_a_row_of_weight_zero_is_not_read(device: torch.device) -> None:
    J = torch.ones(3, 5000, device=device)
    J[1] = float("nan")
    out = gk.combine(J, torch.tensor([2.0, 0.0, 1.0], device=device))
    assert torch.equal(out, torch.full((5000,), 3.0, device=device))


def test_all_weights_zero(device: torch.device) -> None:
    J = torch.full((2, 50), float("inf"), device=device)
    assert torch.equal(gk.combine(J, torch.zeros(2, device=device)), torch.zeros(50, device=device))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_gradients_come_through(value: float, device: torch.device) -> None:
    J = torch.randn(3, 9000, device=device)
    J[1, 4444] = value
    M = gk.gramian(J)
    assert not M[1].isfinite().any()
    assert M[0, 0].isfinite()
    assert M[0, 2].isfinite()
    assert not gk.combine(J, torch.ones(3, device=device))[4444].isfinite()


def test_more_elements_than_32_bits_count(device: torch.device) -> None:
    """32 rows of 2**26 + 3 columns, all of them the same memory: a row stride of 0 is a row stride."""
    row = torch.zeros(2**26 + 3, device=device)
    row[::4096] = 0.5
    row[-1] = 2.0
    J = row.expand(32, -1)
    square = 0.25 * (2**14 + 1) + 4.0  # exact in float32
    assert torch.equal(gk.gramian(J), torch.full((32, 32), square, device=device))
    w = torch.zeros(32, device=device)
    w[31] = 3.0
    assert gk.combine(J, w)[-1] == 6.0


def test_the_same_bits_every_time(device: torch.device) -> None:
    for T, P in ((3, 300_001), (16, 50_000), (40, 20_000)):
        J = torch.randn(T, P, device=device)
        first = gk.gramian(J)
        assert all(torch.equal(gk.gramian(J), first) for _ in range(5))


def test_the_same_bits_in_another_process() -> None:
    code = """
import hashlib, torch, gradkern as gk
torch.manual_seed(0)
J = torch.randn(5, 70001)
M = gk.gramian(J)
g = gk.PCGrad()(J)
print(hashlib.sha256(M.numpy().tobytes() + g.numpy().tobytes()).hexdigest())
"""
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout
    assert len(runs[0].stdout.strip()) == 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype: torch.dtype, device: torch.device) -> None:
    J = torch.randn(3, 9000, device=device).to(dtype)
    w = torch.randn(3, device=device)
    plain = gk.gramian(J), gk.combine(J, w), gk.project(J, w[None]), gk.PCGrad(order=[0, 1, 2])(J)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        inside = gk.gramian(J), gk.combine(J, w), gk.project(J, w[None]), gk.PCGrad(order=[0, 1, 2])(J)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_matmul_precision_changes_nothing(setting: str, device: torch.device) -> None:
    """bfloat16 products would be wrong by 1e-2, TF32 ones by 1e-3."""
    J = torch.randn(16, 9000, device=device)
    W = torch.randn(2, 16, device=device)
    norms = reference.gramian(J.cpu()).diagonal().sqrt()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        M, Jp = gk.gramian(J), gk.project(J, W)
    finally:
        torch.set_float32_matmul_precision(before)
    assert_near(M.cpu(), reference.gramian(J.cpu()), torch.outer(norms, norms), _sum(torch.float32))
    size = reference.project(J.cpu().abs(), W.cpu().abs().tolist())
    assert_near(Jp.cpu(), reference.project(J.cpu(), W.cpu().tolist()), size, TOLERANCES[torch.float32])


@pytest.mark.parametrize("P", [0, 1, 7])
@pytest.mark.parametrize("segments", [None, 3])
def test_derivatives(P: int, segments: int | None, device: torch.device) -> None:
    """First and second ones, in float64, by finite differences."""
    offsets = None if segments is None else torch.tensor([0, P // 2, P // 2, P])
    S = () if segments is None else (segments,)
    options = {"dtype": torch.float64, "device": device, "requires_grad": True}
    J, w, W = torch.randn(3, P, **options), torch.randn(*S, 3, **options), torch.randn(*S, 2, 3, **options)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda J: gk.gramian(J, offsets), (J,))
        assert check(lambda J, w: gk.combine(J, w, offsets), (J, w))
        assert check(lambda J, W: gk.project(J, W, offsets), (J, W))


def test_torch_func_is_right_or_raises() -> None:
    J = torch.randn(3, 50, dtype=torch.float64)

    def f(J: Tensor) -> Tensor:
        return gk.combine(J, gk.gramian(J)[0]).square().sum()

    x = J.clone().requires_grad_()
    assert torch.allclose(torch.func.grad(f)(J), torch.autograd.grad(f(x), x)[0], rtol=1e-12)
    for operator in (gk.gramian, lambda J: gk.combine(J, J[:, 0]), lambda J: gk.project(J, J[:, :3])):
        with pytest.raises(RuntimeError, match="jvp"):
            torch.func.jvp(operator, (J,), (J,))


def test_the_graph_can_be_used_twice(device: torch.device) -> None:
    J = torch.randn(3, 50, device=device, requires_grad=True)
    value = gk.combine(J, gk.gramian(J)[0]).sum()
    (first,) = torch.autograd.grad(value, J, retain_graph=True)
    (second,) = torch.autograd.grad(value, J)
    assert first.abs().max() > 0
    assert torch.equal(first, second)


def test_compiled_without_graph_breaks(device: torch.device) -> None:
    method = gk.PCGrad(order=[2, 0, 1])

    def program(J: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
        M = gk.gramian(J)
        return M, gk.project(J, W) * gk.combine(J, method.weights(M))

    J = torch.randn(3, 5000, device=device, requires_grad=True)
    W = torch.randn(2, 3, device=device)
    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(J, W), program(J, W), strict=True):
        assert torch.equal(actual, expected)
        (g,) = torch.autograd.grad(actual.sum(), J, retain_graph=True)
        (h,) = torch.autograd.grad(expected.sum(), J, retain_graph=True)
        assert torch.equal(g, h)


def test_operators_keep_torchs_contract(device: torch.device) -> None:
    ops = torch.ops.gradkern
    J = torch.randn(3, 9000, device=device)
    offsets = torch.tensor([0, 10, 9000])
    opcheck(ops.gramian.default, (J,))
    opcheck(ops.gramian.default, (J.bfloat16(), offsets))
    opcheck(ops.combine.default, (J, torch.randn(2, 3, device=device), offsets))
    opcheck(ops.combine.out, (J, torch.randn(2, 3, device=device), offsets, J.new_empty(9000)))
    opcheck(ops.project.default, (J, torch.randn(2, 3, device=device)))
    opcheck(ops.cross.default, (J, torch.randn(2, 9000, device=device), offsets))
    M = torch.randn(2, 3, 3, device=device)
    opcheck(ops.pcgrad.default, (M, torch.rand(1, 3, 3, device=device), "all"))
    opcheck(ops.pcgrad.default, (M.mT, torch.rand(2, 3, 3, device=device), "random"))
    opcheck(ops.pcgrad.matrix, (J, torch.rand(1, 3, 3, device=device), "all", False))
    opcheck(ops.pcgrad.matrix, (J.bfloat16(), torch.rand(1, 3, 3, device=device), "random", True))
    opcheck(ops.pcgrad.matrix_out, (J, torch.rand(1, 3, 3, device=device), "all", False, J.new_empty(9000)))
    for partner in ("average", "most_similar"):
        opcheck(ops.pcgrad.default, (M, None, partner))
        opcheck(ops.pcgrad.matrix, (J, None, partner, False))


def _sum(dtype: torch.dtype) -> float:
    """A Gramian is summed in float32 whatever the rows' dtype, so 16-bit rows are no excuse."""
    return TOLERANCES[torch.float64 if dtype == torch.float64 else torch.float32]


@pytest.mark.parametrize("P", [1, 14, 15, 30, 100])
def test_gramian_of_more_rows_than_columns(P: int) -> None:
    J = torch.randn(5000, P)
    error = (gk.gramian(J) - J.double() @ J.double().T).abs().max()
    assert error <= TOLERANCES[torch.float32] * float(J.square().sum(1).max())
