"""Ten methods in a few lines each on the solvers: they meet their conditions, and TorchJD's results."""

from typing import Any

import pytest
import torch
from torch import Tensor

import gradkern as gk
from gradkern.aggregators.solvers.active_set import kkt_residual, nonnegative
from gradkern.aggregators.solvers.arrays import carried, identity, space
from gradkern.aggregators.solvers.ball import best_in_ball
from gradkern.aggregators.solvers.fair import fair
from gradkern.aggregators.solvers.min_norm import min_norm
from gradkern.aggregators.solvers.scaling import mean_weights, scaled
from tests.aggregators.solvers.hard import distance_of_zero, gramians, mixed
from tests.tolerances import assert_near

CONDITION = 1e-9
T_SOME = (1, 2, 3, 8, 20, 40)
each_size = pytest.mark.parametrize("T", T_SOME)


def regularized(M: Any) -> Any:
    """G = M / tr M + 1e-4 I."""
    trace = M.diagonal(0, -2, -1).sum(-1)[..., None, None]
    return M / space(M).where(trace > 0, trace, 1.0) + 1e-4 * identity(M)


@carried
def cagrad(M: Any, c: float = 0.4) -> Any:
    e = mean_weights(M)
    return e + best_in_ball(M, e, c)


@carried
def upgrad(M: Any) -> Any:
    G, e = regularized(M), mean_weights(M)
    return nonnegative(G[..., None, :, :], G * e[..., None]).sum(-2) + e


@carried
def dualproj(M: Any) -> Any:
    G, e = regularized(M), mean_weights(M)
    return nonnegative(G, (G @ e[..., None])[..., 0]) + e


@carried
def pcd(M: Any, lengths: Any, tau: float) -> Any:
    """The first task comes first; ``lengths`` (..., T) are running means of the rows' lengths."""
    xp = space(M)
    K, n, rows, _ = problem = scaled(M)
    first = identity(M)[0] > 0
    relative = xp.where(rows, n / lengths, 0.0)
    others = rows & ~first
    slack = xp.where(others, K[..., 0] * relative[..., :1] - tau * relative, 0.0)
    both = others[..., None] & others[..., None, :]
    v = nonnegative(xp.where(both, K, identity(K)), slack) + xp.where(first, relative, 0.0)
    square = (v * (K @ v[..., None])[..., 0]).sum(-1)[..., None]
    return problem.weights(v * (n[..., :1] / square**0.5))


def imtlg(M: Tensor) -> Tensor:
    return gk.IMTLG().weights(M)


def config(M: Tensor) -> Tensor:
    return gk.ConFIG().weights(M)


def aligned(M: Tensor) -> Tensor:
    return gk.AlignedMTL().weights(M)


def product(M: Tensor, w: Tensor) -> Tensor:
    return (M @ w.unsqueeze(-1)).squeeze(-1)


def divided(M: Tensor) -> tuple[Tensor, Tensor]:
    """The Gramian of unit rows, and the lengths."""
    n = M.diagonal(dim1=-2, dim2=-1).sqrt()
    n = torch.where(n > 0, n, 1.0)
    return M / n.unsqueeze(-1) / n.unsqueeze(-2), n


@each_size
def test_mgda(T: int) -> None:
    M = mixed(max(1, 30 // T), T)
    w = carried(min_norm)(M)
    K, n = divided(M)
    slope, size = product(K, n * w), (n * w).sum(-1, keepdim=True)
    short = (n * w * slope).sum(-1, keepdim=True) / n - slope
    assert torch.where(M.diagonal(dim1=-2, dim2=-1) > 0, short / size, 0.0).max() <= CONDITION


@each_size
def test_cagrad_by_the_stationarity_of_its_scalar_problem(T: int) -> None:
    """f(w) = wᵀMe/T + c‖g₀‖ √(wᵀMw) on the simplex: ∇f_i >= f(w), because ∇fᵀw = f(w)."""
    M = torch.cat([gramians(kind, spread, 20, T, 3 * T) for kind in ("any", "common") for spread in (0, 3)])
    e = torch.full((len(M), T), 1 / T, dtype=torch.float64)
    w = cagrad(M) - e
    w = w / w.sum(-1, keepdim=True)
    K, n = divided(M)
    center, v = n * e, n * w
    base, step = product(K, center), product(K, v)
    radius = 0.4 * (center * base).sum(-1, keepdim=True).sqrt()
    slope = base + radius * step / (v * step).sum(-1, keepdim=True).sqrt()
    value = (v * slope).sum(-1, keepdim=True)
    assert ((value / n - slope) / center.sum(-1, keepdim=True)).max() <= CONDITION


@each_size
def test_nash_and_fairgrad(T: int) -> None:
    """(M / ‖M‖) w = 1 / w, and M w = w^(-1/α)."""
    M = torch.cat([gramians(kind, spread, 20, T, 3 * T) for kind in ("any", "common") for spread in (0, 3)])
    unit = M / M.norm(dim=(-2, -1), keepdim=True)
    w = carried(fair)(unit)
    assert_near(product(unit, w) * w, torch.ones(w.shape), 1.0, CONDITION)
    for alpha in (0.5, 2.0):
        w = carried(fair)(M, alpha)
        assert_near(product(M, w) * w ** (1 / alpha), torch.ones(w.shape), 1.0, CONDITION)


@each_size
def test_upgrad_and_dualproj(T: int) -> None:
    """v >= e_i/T, Gv >= 0, and one of both is an equation for every task."""
    M = mixed(1, T)
    G = regularized(M)
    for e in (*torch.eye(T).double()[: min(T, 5)] / T, torch.full((T,), 1 / T, dtype=torch.float64)):
        p = (G @ e.unsqueeze(-1)).squeeze(-1)
        v = carried(nonnegative)(G, p)
        assert kkt_residual(G, p, v).max() <= CONDITION
        assert_near((v * product(G, v + e)).sum(-1), torch.zeros(len(M)), 1 + v.square().sum(-1), CONDITION)
    assert_near(dualproj(M), carried(nonnegative)(G, p) + 1 / T, 1.0, 1e-12)


@each_size
def test_pcd(T: int) -> None:
    """The change of the first row is a combination of the rows whose constraints are tight; none is missed by much."""
    tau = 0.02
    M = torch.cat([gramians(kind, spread, 20, T, 3 * T) for kind in ("any", "common") for spread in (0, 3)])
    K, n = divided(M)
    w = pcd(M, n, tau)
    assert_near((w * product(M, w)).sum(-1).sqrt() / n[:, 0], torch.ones(len(M)), 1.0, CONDITION)
    v = w * n
    v = v / v[:, :1]  # of the first row as it was
    slack, size = product(K, v) - tau, v.sum(-1, keepdim=True)
    assert v.min() >= 0
    assert (-slack[:, 1:] / size).amax(-1).max() <= CONDITION if T > 1 else True
    assert ((v * slack).abs()[:, 1:] / size.square()).amax(-1).max() <= CONDITION if T > 1 else True


@each_size
def test_imtlg_and_config(T: int) -> None:
    """Equal projections on all unit rows; ConFIG's length is the sum of the projections of the rows."""
    M = torch.cat([gramians(kind, spread, 20, T, 3 * T) for kind in ("any", "common") for spread in (0, 3)])
    K, n = divided(M)
    for w in (imtlg(M), config(M)):
        v = n * w
        projections = product(K, v)
        assert_near(projections, projections[:, :1].expand_as(v), v.abs().sum(-1, keepdim=True), CONDITION)
    direction = v / (v * projections).sum(-1, keepdim=True).sqrt()
    length = (n * product(K, direction)).sum(-1)
    assert_near((v * projections).sum(-1).sqrt() / length, torch.ones(len(M)), 1.0, CONDITION)
    assert_near(imtlg(M).sum(-1), torch.ones(len(M)), imtlg(M).abs().sum(-1), 1e-12)


@each_size
def test_aligned_mtl(T: int) -> None:
    """B M B = λ I on rows of full rank: the principal components are orthogonal and equally long.

    For more than 25 rows LAPACK divides and conquers, which costs digits: their lengths span four orders, not six.
    """
    spreads = (0, 3) if T <= 25 else (0, 2)
    M = torch.cat([gramians(kind, spread, 5, T, 5 * T) for kind in ("any", "common") for spread in spreads])
    eye = torch.eye(T, dtype=torch.float64)
    B = torch.stack([gk.AlignedMTL(preference=e).weights(M) for e in eye], -1)
    alike = B @ M @ B
    smallest = alike.diagonal(dim1=-2, dim2=-1).amin(-1)[:, None, None]
    assert_near(alike / smallest, eye.expand_as(M), 1.0, CONDITION)


def test_low_rank_rows_have_finite_weights() -> None:
    for M in (mixed(2, 8, ranks=(1, 3)), mixed(2, 3, ranks=(1, 2))):
        for method in (carried(min_norm), carried(fair), cagrad, upgrad, dualproj, imtlg, config, aligned):
            assert method(M).isfinite().all(), method


def test_zero_is_in_the_hull_only_of_some() -> None:
    """The hard Gramians are of both kinds, so that the tests above mean something."""
    near = distance_of_zero(mixed(5, 4)) < 1e-11
    assert 0.1 <= near.double().mean() <= 0.7


@pytest.mark.parametrize("T", [2, 3, 8, 20])
def test_as_torchjd(T: int) -> None:
    pytest.importorskip("quadprog")
    peers = pytest.importorskip("torchjd.aggregation")
    M = gramians("common", 0, 1, T, 3 * T)[0]
    n = divided(M)[1]
    J = torch.linalg.cholesky(M)
    pairs = {
        "upgrad": (upgrad(M), peers.UPGradWeighting()(M)),
        "dualproj": (dualproj(M), peers.DualProjWeighting()(M)),
        "imtlg": (imtlg(M), peers.IMTLGWeighting()(M)),
        "aligned": (aligned(M) / T, peers.AlignedMTLWeighting()(M)),
        "pcd": (pcd(M, (n.square() + 1e-8).sqrt(), 0.02), peers.PCDWeighting()(M)),
        "config": (config(M) @ J, peers.ConFIG()(J)),
    }
    for name, (ours, theirs) in pairs.items():
        error = (ours - theirs).abs().max() / theirs.abs().max()
        assert error <= 1e-7, (name, error)  # PCD's active set stops at 1e-9 of the Gramian, and divides by its length
