"""Eigenvalues and what is computed from them, on both kinds of arrays."""

import math

import pytest
import torch
from torch import Tensor

from gradkern.aggregators.solvers import eigen
from gradkern.aggregators.solvers.arrays import carried
from gradkern.aggregators.solvers.eigen import eigen_residual, eigh, numerical_rank, pseudo_inverse, spread
from gradkern.aggregators.solvers.scaling import scaled
from tests.aggregators.solvers.hard import T_ALL, gramians, mixed
from tests.tolerances import assert_near

EPS = 2.0**-52
inverse = carried(pseudo_inverse)


def on_host(M: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues and eigenvectors that a CPU computes."""
    values, vectors = eigh(M.numpy())
    return torch.from_numpy(values), torch.from_numpy(vectors)


@pytest.mark.parametrize("T", T_ALL)
def test_eigenvalues_and_vectors(T: int) -> None:
    M = mixed(2 if T < 20 else 1, T)
    by_kind = [on_host(M), eigh(M)]
    for values, vectors in by_kind:
        assert eigen_residual(M, values, vectors).max() <= 1e-10  # among many eigenvalues of 0, Jacobi's is slow
        assert (values.diff() >= 0).all()
    (a, _), (b, _) = by_kind
    assert_near(a, b, M.amax((-2, -1)).unsqueeze(-1), 1e-12)
    assert_near(b, torch.linalg.eigvalsh(M), M.amax((-2, -1)).unsqueeze(-1), 1e-12)


@pytest.mark.parametrize("T", [2, 3, 8, 20, 25, 40])
def test_small_eigenvalues_keep_their_digits(T: int) -> None:
    """They are as accurate as those of the cosines allow, relative to themselves, though 1e-12 of the largest.

    The inverses' eigenvalues are the reciprocals, and there the small ones are the largest.
    """
    M = gramians("any", 3, 20, T, 5 * T)
    n = M.diagonal(dim1=-2, dim2=-1).sqrt()
    K = M / n.unsqueeze(-1) / n.unsqueeze(-2)
    smallest = 1 / torch.linalg.eigvalsh(torch.linalg.inv(K) / n.unsqueeze(-1) / n.unsqueeze(-2))[:, -1]
    for values, _ in (on_host(M), eigh(M)) if T <= 25 else (eigh(M),):
        assert_near(values[:, 0] / smallest, torch.ones(20), 1.0, 1e-9)


@pytest.mark.parametrize("T", T_ALL)
def test_pseudo_inverse(T: int) -> None:
    """M (M⁺ b) is b within the range of M; and b outside of it goes nowhere."""
    K = scaled(mixed(1, T, spreads=(0,), ranks=(max(1, T // 3), 3 * T))).K
    values = torch.linalg.eigvalsh(K)
    # Of a known rank: none of the eigenvalues is near what is taken for rounding.
    clear = ~((values > 1e-16) & (values < 1e-9)).any(-1)
    K = K[clear]
    c = torch.randn_like(K[..., :1])
    b = (K @ c).squeeze(-1)
    for x in (inverse(K, b, 1e-12), pseudo_inverse(K, b, 1e-12)):
        size = b.abs().amax(-1, keepdim=True) + x.abs().amax(-1, keepdim=True)
        assert_near((K @ x.unsqueeze(-1)).squeeze(-1), b, size, 1e-9)
        assert_near(x, (torch.linalg.pinv(K, rtol=T * 1e-12, hermitian=True) @ b.unsqueeze(-1)).squeeze(-1), size, 1e-6)


def test_a_regular_matrix_is_inverted_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    K = scaled(gramians("common", 3, 30, 8, 20)).K
    b = torch.randn(30, 8, dtype=torch.float64)
    direct = inverse(K, b, EPS)
    monkeypatch.setattr(eigen, "REGULAR", 0.0)
    assert_near(inverse(K, b, EPS), direct, direct.abs().max(), 1e-11)


def test_one_singular_matrix_of_many() -> None:
    K = torch.eye(3).double().repeat(3, 1, 1)
    K[1] = 1
    b = torch.ones(3, 3, dtype=torch.float64)
    expected = torch.ones(3, 3, dtype=torch.float64)
    expected[1] = 1 / 3
    assert_near(inverse(K, b, EPS), expected, 1.0, 1e-14)


def test_the_rank_depends_on_the_precision_of_the_entries() -> None:
    values = torch.tensor([[1e-9, 1e-5, 1.0]]).double()
    assert numerical_rank(values, 2.0**-23).tolist() == [[False, True, True]]
    assert numerical_rank(values, 2.0**-52).all()


def test_functions_of_a_matrix() -> None:
    M = gramians("any", 0, 4, 5, 9)
    values, vectors = eigh(M)
    b = torch.randn(4, 5, dtype=torch.float64)
    root = [spread(values.sqrt(), vectors, b)]
    root.append(spread(values.sqrt(), vectors, root[0]))
    assert_near(root[1], (M @ b.unsqueeze(-1)).squeeze(-1), M.max() * 5, 1e-13)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_its_own(bad: float) -> None:
    M = gramians("any", 0, 3, 4, 9)
    b = torch.ones(3, 4, dtype=torch.float64)
    expected = inverse(M, b, EPS)
    M[1, 2, 2] = bad
    for x in (inverse(M, b, EPS), pseudo_inverse(M, b, EPS)):
        assert x[1].isnan().all()
        assert_near(x[[0, 2]], expected[[0, 2]], expected.abs().max(), 1e-12)
    for values, _ in (on_host(M), eigh(M)):
        assert values[1].isnan().all()
        assert values[[0, 2]].isfinite().all()
