"""IMTL-G, ConFIG and Aligned-MTL: their conditions, on hard Gramians too, and what has no solution."""

import pytest
import torch
from torch import Tensor

import gradkern as gk
from gradkern import reference
from gradkern.aggregators.gramian.base import GramianMethod
from gradkern.aggregators.solvers.scaling import scaled
from tests.aggregators.solvers.hard import gramians, mixed
from tests.problems import PROBLEMS, conflicting
from tests.tolerances import assert_near

CONDITION = 1e-9
T_SOME = (1, 2, 3, 8, 20, 40)
each_size = pytest.mark.parametrize("T", T_SOME)
SPECTRAL = (gk.IMTLG, gk.ConFIG, gk.AlignedMTL)


def independent(T: int) -> Tensor:
    return torch.cat([gramians(kind, spread, 10, T, 3 * T) for kind in ("any", "common") for spread in (0, 3)])


def product(M: Tensor, w: Tensor) -> Tensor:
    return (M @ w.unsqueeze(-1)).squeeze(-1)


@each_size
def test_imtlg_has_equal_projections_on_all_unit_gradients(T: int) -> None:
    M = independent(T)
    K, n, _, _ = scaled(M)
    w = gk.IMTLG().weights(M)
    projections = product(K, n * w)
    assert_near(projections, projections[:, :1].expand_as(w), (n * w).abs().sum(-1, keepdim=True), CONDITION)
    assert_near(w.sum(-1), torch.ones(len(M)), w.abs().sum(-1), 1e-12)


@each_size
def test_config_has_the_projections_preferred_and_the_length_of_the_projections(T: int) -> None:
    M, p = independent(T), torch.rand(T, dtype=torch.float64) + 0.1
    K, n, _, _ = scaled(M)
    for method, wanted in ((gk.ConFIG(), torch.ones(T).double()), (gk.ConFIG(p), p)):
        v = n * method.weights(M)
        projections = product(K, v)
        scale = projections[:, :1] / wanted[0]
        assert_near(projections, scale * wanted, v.abs().sum(-1, keepdim=True), CONDITION)
        length = (v * projections).sum(-1).sqrt()
        assert_near(length, (n * projections / length.unsqueeze(-1)).sum(-1), length, CONDITION)


@each_size
def test_aligned_mtl_makes_principal_components_equally_long(T: int) -> None:
    """BMB = λ_R I. For more than 25 rows LAPACK divides and conquers, which costs digits: hence fewer decades."""
    spreads = (0, 3) if T <= 25 else (0, 2)
    M = torch.cat([gramians(kind, spread, 5, T, 5 * T) for kind in ("any", "common") for spread in spreads])
    values = torch.linalg.eigvalsh(M)
    found = {"min": values[:, 0], "median": values[:, (T - 1) // 2], "rmse": values.mean(-1)}
    eye = torch.eye(T, dtype=torch.float64)
    for scale, expected in found.items():
        B = torch.stack([gk.AlignedMTL(scale, e).weights(M) for e in eye], -1)
        alike = B @ M @ B
        size = alike.diagonal(dim1=-2, dim2=-1).amin(-1)[:, None, None]
        assert_near(alike / size, eye.expand_as(M), 1.0, CONDITION)
        # torch's eigenvalues are off by a few roundings of the largest.
        assert_near(size.flatten(), expected, expected + 1e-6 * values[:, -1], 1e-6)
        assert_near(gk.AlignedMTL(scale).weights(M), B.sum(-1), B.abs().sum(-1), CONDITION)


@pytest.mark.parametrize("problem", ["conflicting", "duplicate", "zero", "tiny", "huge"])
@pytest.mark.parametrize("T", [1, 2, 3, 6])
def test_as_the_twins_for_dependent_rows_too(T: int, problem: str) -> None:
    torch.manual_seed(T)
    J = PROBLEMS[problem](T, 40)
    p = torch.rand(T, dtype=torch.float64).tolist()
    size = J.norm(dim=1).sum()
    assert_near(gk.IMTLG()(J), reference.imtl_g(list(J)), 100 * size, 1e-9)
    assert_near(gk.ConFIG(p)(J), reference.config(list(J), p), size, 1e-9)
    for scale in ("min", "median", "rmse"):
        # A Gramian holds squares: components of 1e-8 of the longest are beyond it, and rounding for the twin.
        assert_near(gk.AlignedMTL(scale, p)(J), reference.aligned_mtl(list(J), scale, p), size, 1e-7)


def test_two_tasks_by_hand() -> None:
    """Equal projections mean v₁ = v₂ in the scale of unit rows, w_i = v_i / n_i."""
    M = gramians("any", 2, 100, 2, 5)
    n = M.diagonal(dim1=-2, dim2=-1).sqrt()
    assert_near(gk.IMTLG().weights(M), n.flip(-1) / n.sum(-1, keepdim=True), 1.0, 1e-10)
    J = torch.tensor([[3.0, 0.0], [0.0, 4.0]]).double()
    assert_near(gk.ConFIG()(J), torch.tensor([3.5, 3.5]), 1.0, 1e-12)  # (3 + 4) / √2 long along (1, 1)
    assert_near(gk.AlignedMTL()(J), torch.tensor([3.0, 3.0]), 1.0, 1e-12)
    assert_near(gk.AlignedMTL("rmse", [1, 0])(J), torch.tensor([12.5**0.5, 0.0], dtype=torch.float64), 1.0, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lengths", [(1.0, 1.0), (1.0, 2.0), (1e-3, 1e3)])
def test_opposite_gradients_have_no_equal_projections(lengths: tuple[float, float], dtype: torch.dtype) -> None:
    g = torch.randn(30, dtype=dtype)
    J = torch.stack((lengths[0] * g, -lengths[1] * g, torch.zeros(30, dtype=dtype)))
    M = gk.gramian(J)
    assert torch.equal(gk.IMTLG().weights(M), torch.tensor([0.5, 0.5, 0.0], dtype=dtype))
    assert torch.equal(gk.ConFIG().weights(M), torch.zeros(3, dtype=dtype))


@pytest.mark.parametrize("cls", SPECTRAL)
def test_hard_gramians_have_finite_weights(cls: type[GramianMethod]) -> None:
    for T in T_SOME:
        for M in (mixed(1, T), mixed(1, T).float(), 0 * mixed(1, T)):
            assert cls().weights(M).isfinite().all()


@pytest.mark.parametrize("cls", SPECTRAL)
def test_the_rank_is_that_of_the_rows_arithmetic(cls: type[GramianMethod]) -> None:
    """Rows equal up to 1e-5 are equal in float32, whose products say no more, and distinct in float64."""
    J = torch.randn(3, 50, dtype=torch.float64)
    J[1] = J[0] + 1e-5 * torch.randn(50)
    M = (J @ J.mT).expand(2, 3, 3)
    eps = [torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)]
    w = cls().solution(M, None, eps=eps).weights
    equal = torch.stack((J[0], J[0], J[2]))
    assert_near(w[0] @ J, cls()(equal), J.norm(), 1e-3)
    assert torch.equal(w[1], cls().weights(M)[1])
    assert not torch.allclose(w[0], w[1], rtol=0.1)


def test_a_step_of_two_precisions_solves_each_group_in_its_own() -> None:
    """One group of float32 and one of float64 with equal gradients: a step is as one of each alone."""
    for cls in SPECTRAL:
        p, q = (torch.nn.Parameter(torch.ones(50, dtype=dtype)) for dtype in (torch.float32, torch.float64))
        J = torch.randn(3, 50)
        J[1] = J[0] + 1e-5 * torch.randn(50)
        losses = [(p * row).sum() + (q * row.double()).sum() for row in J]
        gk.backward(losses, {"a": p, "b": q}.items(), aggregator=cls(), groups="parameter")
        assert_near(p.grad, cls()(J), J.norm(), 1e-3)
        assert_near(q.grad, cls()(J.double()), J.norm(), 1e-6)


@pytest.mark.parametrize("cls", SPECTRAL)
@pytest.mark.parametrize("wrong", [[1.0, 2.0], [1.0] * 4])
def test_a_preference_for_other_tasks_is_named(cls: type[GramianMethod], wrong: list[float]) -> None:
    if cls is not gk.IMTLG:
        with pytest.raises(ValueError, match=rf"preference has {len(wrong)} entries for 3 tasks: \[1.0"):
            cls(preference=wrong)(torch.randn(3, 9))


def test_what_a_preference_means() -> None:
    """ConFIG's dot products with the unit vectors are as the preferences, also 0; AlignedMTL's have the sign of p."""
    J = conflicting(3, 40)
    d = gk.ConFIG([2.0, 0.0, 1.0])(J)
    products = (J / J.norm(dim=1, keepdim=True)) @ d
    assert products[0] > 0
    assert_near(products, products[0] * torch.tensor([1.0, 0.0, 0.5]).double(), J.norm(), 1e-9)
    rows = torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    assert_near(gk.AlignedMTL(preference=[1.0, -1.0])(rows), torch.tensor([3.0, -3.0]).double(), 1.0, 1e-12)
    with pytest.raises(ValueError, match=r"preference\[1\] must be a number that is at least 0 and finite, got -1"):
        gk.ConFIG([1, -1])
    for cls in (gk.ConFIG, gk.AlignedMTL):
        with pytest.raises(ValueError, match=r"preference must hold a number other than 0, got \[0, 0\]"):
            cls(preference=[0, 0])


@pytest.mark.parametrize("T", [1, 2, 3, 8])
def test_as_torchjd(T: int) -> None:
    peers = pytest.importorskip("torchjd.aggregation")
    J = conflicting(T, 40)
    M = gk.gramian(J)
    p = torch.rand(T, dtype=torch.float64)
    assert_near(gk.IMTLG().weights(M), peers.IMTLGWeighting()(M), gk.IMTLG().weights(M).abs().max(), 1e-9)
    assert_near(gk.ConFIG()(J), peers.ConFIG()(J), J.norm(), 1e-9)
    assert_near(gk.ConFIG(p)(J), peers.ConFIG(p)(J), J.norm(), 1e-9)
    for scale in ("min", "median", "rmse"):
        theirs = peers.AlignedMTLWeighting(p, scale)(M)
        assert_near(gk.AlignedMTL(scale, p).weights(M), theirs, theirs.abs().max(), 1e-9)
        assert_near(gk.AlignedMTL(scale).weights(M) / T, peers.AlignedMTLWeighting(None, scale)(M), 1.0, 1e-9)
