"""The Triton programs on T x T numbers, and those on single entries, against loops in Python."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from gradkern import reference
from gradkern.ops import operators
from gradkern.ops.dtypes import arithmetic_dtype
from gradkern.ops.partners import ORDERED, PARTNERS
from gradkern.ops.pytorch import host_programs
from tests import interpreter
from tests.tolerances import DTYPES, TOLERANCES, assert_near

pytest.importorskip("triton", reason="no Triton on this platform")
if (reason := interpreter.why_not()) and not torch.cuda.is_available():
    pytest.skip(reason, allow_module_level=True)

from gradkern.kernels.pcgrad import PARTNERS as kernels_partners
from gradkern.ops.triton import methods
from gradkern.ops.triton.entries import gather, scatter

# NumPy, in the interpreter, which divides what will not be used.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
F32, F64 = torch.float32, torch.float64


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with interpreter.unwritten_is_nan():
        yield


def gramians(S: int, T: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    """Return J (S, T, P) float64 and its Gramians; the tasks agree and conflict at random."""
    J = torch.randn(S, T, 3 * T, dtype=F64)
    return J, (J @ J.mT).to(dtype)


# PCGrad's partners


@pytest.mark.parametrize("keys_dtype", [F32, F64])
@pytest.mark.parametrize("partner", PARTNERS)
@pytest.mark.parametrize("T", [1, 2, 5])
def test_pcgrad_with_every_partner(T: int, partner: str, keys_dtype: torch.dtype) -> None:
    J, M = gramians(2, T)
    order_keys = torch.rand(2, T, T, dtype=keys_dtype)
    C = methods.pcgrad(M.to(DEVICE), order_keys.to(DEVICE) if partner in ORDERED else None, partner).cpu()
    for s in range(2):
        expected = torch.stack(reference.pcgrad_of(partner, list(J[s]), order_keys[s].argsort(-1).tolist()))
        # The same operations in float64, on a Gramian instead of vectors.
        assert_near(C[s] @ J[s], expected, J[s].norm(dim=-1).max(), 10 * TOLERANCES[F64])


@pytest.mark.parametrize("partner", ORDERED)
@pytest.mark.parametrize("smallest", [0.5, torch.inf])
def test_pcgrad_visits_partners_of_infinite_key_last_and_by_number(smallest: float, partner: str) -> None:
    J, M = gramians(1, 4)
    order_keys = torch.full((1, 4, 4), torch.inf)
    order_keys[0, :, 2] = smallest
    C = methods.pcgrad(M.to(DEVICE), order_keys.to(DEVICE), partner).cpu()
    order = [2, 0, 1, 3] if smallest == 0.5 else [0, 1, 2, 3]
    expected = torch.stack(reference.pcgrad_of(partner, list(J[0]), [order] * 4))
    assert_near(C[0] @ J[0], expected, J[0].norm(dim=-1).max(), 10 * TOLERANCES[F64])


back_ends = pytest.mark.parametrize("pcgrad", [methods.pcgrad, host_programs.pcgrad])
FOLLOWING = [partner for partner in PARTNERS if partner not in ORDERED]


@back_ends
def test_of_partners_of_equal_cosine_the_first(pcgrad: Callable[..., Tensor]) -> None:
    """Tasks 2 and 3 are one direction at lengths 1 : 2, so that no rounding tells the others' cosines with them apart.

    They are the most similar to task 0, of cosine -0.41 each, and the most different from task 1, of -0.87.
    """
    M = torch.tensor([[2, -3, -1, -2], [-3, 7, -4, -8], [-1, -4, 3, 6], [-2, -8, 6, 12]], dtype=F64, device=DEVICE)
    chosen = {"most_similar": [(0, 2), (1, 0)], "most_different": [(0, 1), (1, 2), (2, 1), (3, 1)]}
    for partner, pairs in chosen.items():
        expected = torch.eye(4, dtype=F64, device=DEVICE)
        for i, j in pairs:
            expected[i, j] = -M[i, j] / M[j, j]
        assert torch.equal(pcgrad(M[None], None, partner)[0], expected)


@back_ends
@pytest.mark.parametrize("partner", FOLLOWING)
def test_partners_that_are_no_numbers_or_zero(partner: str, pcgrad: Callable[..., Tensor]) -> None:
    """A cosine that is NaN comes last, and a zero row is no partner; no task is projected onto either row."""
    nan = torch.nan
    M = torch.tensor([[4.0, nan, -2.0, 0.0], [nan, nan, nan, nan], [-2.0, nan, 1.0, 0.0], [0.0, nan, 0.0, 0.0]])
    C = pcgrad(M[None].to(DEVICE), None, partner)[0].cpu()
    # Task 3, a zero row, has a larger cosine with 0 than 2 has.
    a, b = {"average": (2 / 2, 0.5 / 2), "most_similar": (2.0, 0.5), "most_different": (2.0, 0.5)}[partner]
    expected = torch.tensor([[1.0, 0.0, a, 0.0], [0.0, 1.0, 0.0, 0.0], [b, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    assert_near(C, expected, 1.0, TOLERANCES[F32])  # to one rounding of M's dtype


@back_ends
@pytest.mark.parametrize("partner", PARTNERS)
@pytest.mark.parametrize("T", [2, 3, 9, 40])
def test_a_zero_row_is_nobodys_partner(T: int, partner: str, pcgrad: Callable[..., Tensor]) -> None:
    """The others get the coefficients, bit for bit, that they get without it."""
    J, M = gramians(2, T)
    order_keys = torch.rand(2, T, T)
    without = list(range(1, T))
    alone = pcgrad(
        M[:, without][..., without].contiguous().to(DEVICE),
        order_keys[:, without][..., without].contiguous().to(DEVICE) if partner in ORDERED else None,
        partner,
    ).cpu()
    M[:, 0], M[..., 0] = 0, 0
    order_keys[..., 0] = 0  # first of all in every order
    C = pcgrad(M.to(DEVICE), order_keys.to(DEVICE) if partner in ORDERED else None, partner).cpu()
    assert torch.equal(C[:, 1:, 1:], alone)
    assert torch.equal(C[:, 0], torch.eye(T, dtype=M.dtype)[0].expand(2, T))
    assert not C[:, 1:, 0].any()
    J[:, 0] = 0
    for s in range(2):
        expected = torch.stack(reference.pcgrad_of(partner, list(J[s]), order_keys[s].argsort(-1).tolist()))
        assert_near(C[s] @ J[s], expected, T * J[s].norm(dim=-1).max(), 100 * TOLERANCES[F64])


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("partner", FOLLOWING)
def test_both_back_ends_choose_the_same_partners(partner: str, dtype: torch.dtype) -> None:
    """The bits are equal on small integers below zero, which make many cosines equal, or equal but for rounding."""
    M = torch.randint(-3, 1, (12, 5, 5)).to(dtype)
    M += M.mT.clone()
    M.diagonal(dim1=-2, dim2=-1).copy_(torch.randint(0, 30, (12, 5)))
    M[1::3] *= 1e36  # roots of squares whose products would overflow float32
    M[2::3, 0], M[2::3, :, 0] = torch.inf, -torch.inf
    C = methods.pcgrad(M.to(DEVICE), None, partner).cpu()
    expected = host_programs.pcgrad(M, None, partner)
    assert torch.equal(C.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert len(C.unique(dim=0)) == 12


@pytest.mark.parametrize("pcgrad", [methods.pcgrad, host_programs.pcgrad, operators.pcgrad])
@pytest.mark.parametrize(
    ("order_keys", "partner", "message"),
    [
        (None, "nobody", "partner must be 'all', 'random', .*got 'nobody'"),
        (None, "random", "order_keys must be given with partner='random', got None"),
        (torch.zeros(1, 2, 2), "average", "order_keys must be None with partner='average', got some"),
    ],
)
def test_bad_arguments_of_pcgrad_are_named(
    order_keys: Tensor | None, partner: str, message: str, pcgrad: Callable[..., Tensor]
) -> None:
    with pytest.raises(ValueError, match=message):
        pcgrad(torch.eye(2)[None], order_keys, partner)


def test_kernels_number_the_partners_there_are() -> None:
    assert kernels_partners == PARTNERS


# GradVac


def gradvac_loop(
    M: Tensor, order_keys: Tensor, targets: Tensor, update_mask: Tensor, beta: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Return coefficients and moved targets of one segment, by a loop over numbers."""
    T = len(M)
    m = M.double().tolist()
    C, moved = torch.zeros(T, T, dtype=F64), targets.clone()
    for i in range(T):
        c = [float(a == i) for a in range(T)]
        d, e = list(m[i]), [abs(x) for x in m[i]]
        for j in sorted((j for j in range(T) if j != i), key=lambda j: (order_keys[i, j].item(), j)):
            square = sum(x * y for x, y in zip(c, d, strict=True))
            bound = eps * sum(abs(x) * y for x, y in zip(c, e, strict=True))
            n = math.sqrt(square) if square > bound else 0.0
            if not (n > 0 and m[j][j] > 0):
                continue
            phi = d[j] / n / math.sqrt(m[j][j])
            phi = 1.0 if phi > 1 else -1.0 if phi < -1 else phi
            target = targets[i, j].item()
            highest = 1 - math.sqrt(eps)
            u = highest if target > highest else eps - 1 if target < eps - 1 else target
            if phi < u:
                sine = math.sqrt(1 - u * u)
                a = n * (u * math.sqrt(1 - phi * phi) - phi * sine) / (math.sqrt(m[j][j]) * sine)
                e = [x + (abs(c[j] + a) - abs(c[j])) * abs(y) for x, y in zip(e, m[j], strict=True)]
                c[j] += a
                d = [x + a * y for x, y in zip(d, m[j], strict=True)]
            if update_mask[i]:
                moved[i, j] = (1 - beta) * target + beta * phi
        C[i] = torch.tensor(c, dtype=F64)
    return C, moved


def check_gradvac(
    M: Tensor, order_keys: Tensor, targets: Tensor, update_mask: Tensor, beta: float, rtol: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Run the kernel, compare it with the loop, and return its coefficients and targets.

    ``rtol``: of the coefficients; that of the dtype where it is larger.
    """
    S = len(M)
    moved = targets.to(DEVICE, copy=True)
    C = methods.gradvac(M.to(DEVICE), order_keys.to(DEVICE), moved, update_mask.to(DEVICE), beta).cpu()
    moved = moved.cpu()
    eps = torch.finfo(M.dtype).eps
    assert C.dtype == M.dtype
    for s in range(S):
        expected, expected_moved = gradvac_loop(
            M[s], order_keys[s % len(order_keys)], targets[s], update_mask, beta, eps
        )
        # The loop is float64 on both sides, in another order of sums; C is then stored as M is.
        rtol = max(rtol, TOLERANCES[M.dtype])
        torch.testing.assert_close(C[s].double(), expected, rtol=rtol, atol=1e-10, equal_nan=True)
        torch.testing.assert_close(moved[s], expected_moved, rtol=0, atol=1e-12, equal_nan=True)
    return C, moved


@pytest.mark.parametrize(
    ("S", "T", "dtype"), [(1, 1, F32), (3, 2, F64), (2, 3, F32), (2, 3, F64), (2, 9, F64), (1, 17, F32)]
)
def test_gradvac_is_the_loop(S: int, T: int, dtype: torch.dtype) -> None:
    _, M = gramians(S, T, dtype)
    update_mask = torch.rand(T) < 0.7
    targets = torch.rand(S, T, T, dtype=F64) - 0.5
    _, moved = check_gradvac(M, torch.rand(S, T, T, dtype=dtype), targets, update_mask, 0.01)
    assert torch.equal(moved[:, ~update_mask], targets[:, ~update_mask])
    assert torch.equal(moved.diagonal(dim1=1, dim2=2), targets.diagonal(dim1=1, dim2=2))


def test_gradvac_of_two_tasks_reaches_its_target() -> None:
    J, M = gramians(1, 2)
    targets = torch.full((1, 2, 2), 0.9, dtype=F64)
    C, _ = check_gradvac(M, torch.zeros(1, 2, 2), targets, torch.ones(2, dtype=torch.bool), 0.5)
    modified = C[0] @ J[0]
    for i, j in ((0, 1), (1, 0)):
        cosine = torch.nn.functional.cosine_similarity(modified[i], J[0, j], dim=0)
        assert abs(cosine - 0.9) < 1e-12  # float64, of cosines


def test_gradvac_to_targets_of_zero_is_pcgrad() -> None:
    _, M = gramians(2, 6)
    order_keys = torch.rand(1, 6, 6)
    C, moved = check_gradvac(M, order_keys, torch.zeros(2, 6, 6, dtype=F64), torch.ones(6, dtype=torch.bool), 0.0)
    assert_near(
        C, methods.pcgrad(M.to(DEVICE), order_keys.to(DEVICE), "all").cpu(), C.abs().max(), 10 * TOLERANCES[F64]
    )
    assert not moved.any()


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.1])
def test_gradvac_moves_targets_by_beta_to_the_last_bit(beta: float) -> None:
    """Both cosines of two tasks are those of the rows; a beta rounded to float32 would show in the ninth digit."""
    M = torch.tensor([[[4.0, 1.0], [1.0, 16.0]]], dtype=F64)
    targets = torch.tensor([[[0.3, -0.25], [0.5, 0.3]]], dtype=F64)
    _, moved = check_gradvac(M, torch.zeros(1, 2, 2), targets, torch.ones(2, dtype=torch.bool), beta)
    expected = [(1 - beta) * t + beta * 0.125 for t in (-0.25, 0.5)]
    # A multiply-add rounds once where Python rounds twice.
    assert abs(moved[0, 0, 1] - expected[0]) <= 1e-16
    assert abs(moved[0, 1, 0] - expected[1]) <= 1e-16


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("target", [-2.0, -1.0, 0.0, 0.7, 1.0, 2.0])
def test_gradvac_of_rows_that_coincide_oppose_or_vanish(target: float, dtype: torch.dtype) -> None:
    g, h = torch.randn(2, 8, dtype=F64)
    J = torch.stack((g, g, -g, 3 * h, 0 * g, -g + 1e-9 * h))
    M = (J @ J.T).to(dtype)[None]
    # Two rows that oppose: the order of sums moves phi = -1 by a few units in the last place, sqrt(1 - phi^2) by some
    # 3e-8, and so the coefficient by that over sqrt(1 - u^2), which for the highest u is 2e-4.
    C, moved = check_gradvac(
        M, torch.rand(1, 6, 6), torch.full((1, 6, 6), target, dtype=F64), torch.ones(6, dtype=torch.bool), 0.25, 2e-4
    )
    assert C.isfinite().all()
    # A pair with the zero row in it is left alone.
    assert C[0, 4].tolist() == [0, 0, 0, 0, 1, 0]
    assert (moved[0, 4] == target).all()
    assert (moved[0, :, 4] == target).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_gradvac_of_what_is_not_finite_leaves_everything_alone(value: float) -> None:
    """No combination has a length that is a number then, not even one with a coefficient of zero."""
    _, M = gramians(2, 4)
    M[0, 1], M[0, :, 1] = value, value
    targets = torch.rand(2, 4, 4, dtype=F64) - 0.5
    C, moved = check_gradvac(M, torch.rand(2, 4, 4), targets, torch.ones(4, dtype=torch.bool), 0.5)
    assert torch.equal(C[0], torch.eye(4, dtype=F64))
    assert torch.equal(moved[0], targets[0])
    assert not torch.equal(moved[1], targets[1])


def test_bad_arguments_of_gradvac_are_named() -> None:
    M = torch.eye(2, device=DEVICE)[None]
    update_mask = torch.ones(2, dtype=torch.bool, device=DEVICE)
    targets = torch.zeros(1, 2, 2, dtype=F64, device=DEVICE)
    with pytest.raises(ValueError, match=r"order_keys must be \(1, 2, 2\), got \(2, 2, 2\)"):
        methods.gradvac(M, M.expand(2, 2, 2), targets, update_mask, 0.1)
    with pytest.raises(ValueError, match=r"targets must be \(1, 2, 2\), got \(1, 2, 1\)"):
        methods.gradvac(M, M, targets[..., :1], update_mask, 0.1)
    for bad in (targets.float(), targets.mT):
        with pytest.raises(ValueError, match="targets must be contiguous float64"):
            methods.gradvac(M, M, bad, update_mask, 0.1)


# Single entries

NUMELS = [5, 0, 700, 1, 0, 300, 0]
"""Tensors without elements at every kind of place; 1006 positions are several programs."""


@pytest.mark.parametrize("d", [0, 1, 129, 1006])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather(dtype: torch.dtype, d: int) -> None:
    T, n, P = 3, len(NUMELS), sum(NUMELS)
    J = torch.randn(T, P, dtype=F64).to(dtype)
    grads: list[Tensor | None] = [part.to(DEVICE, copy=True) for row in J for part in row.split(NUMELS)]
    grads[n + 2] = None
    J[1, 5:705] = 0
    index = torch.randperm(P)[:d].sort().values
    X = gather(grads, NUMELS, index.to(DEVICE))
    assert X.dtype == arithmetic_dtype(dtype)
    assert torch.equal(X.cpu(), J[:, index].to(X.dtype))


def test_gather_the_same_position_twice_and_of_one_tensor() -> None:
    g = torch.randn(9, device=DEVICE)
    index = torch.tensor([0, 0, 8, 8], device=DEVICE)
    assert torch.equal(gather([g], [9], index)[0], g[index])


@pytest.mark.parametrize("d", [0, 1, 129, 1006])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scatter(dtype: torch.dtype, d: int) -> None:
    index = torch.randperm(sum(NUMELS))[:d].sort().values
    values = torch.randn(d, dtype=arithmetic_dtype(dtype))
    before = torch.randn(sum(NUMELS), dtype=F64).to(dtype)
    out = [part.to(DEVICE, copy=True) for part in before.split(NUMELS)]
    out[2] = torch.full((3,), torch.nan, dtype=dtype, device=DEVICE)[1:1]  # skipped, and not at address 0
    scatter(values.to(DEVICE), NUMELS, index.to(DEVICE), out)
    expected = before.clone()
    expected[index] = values.to(dtype)
    parts = [p for k, p in enumerate(expected.split(NUMELS)) if k != 2]
    result = torch.cat([t.cpu() for k, t in enumerate(out) if k != 2])
    # The interpreter cuts bfloat16 off where a GPU rounds.
    assert_near(result, torch.cat(parts), torch.cat(parts).abs(), TOLERANCES[dtype] if dtype == torch.bfloat16 else 0)


def test_scatter_needs_a_value_for_each_position() -> None:
    index = torch.tensor([0, 1], device=DEVICE)
    with pytest.raises(ValueError, match=r"values must have the shape of index, \(2,\), got \(3,\)"):
        scatter(torch.ones(3, device=DEVICE), [4], index, [torch.ones(4, device=DEVICE)])
