"""The kernels that solve T x T problems: optimality, the reference through whole methods, and the limits."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import gradkern as gk
from gradkern import reference
from gradkern.aggregators.solvers import active_set, arrays, eigen, fair
from gradkern.aggregators.solvers.arrays import carried
from gradkern.aggregators.solvers.scaling import scaled
from gradkern.ops import operators
from tests import interpreter
from tests.aggregators.solvers.hard import gramians, integers, mixed
from tests.tolerances import assert_near

pytest.importorskip("triton", reason="no Triton on this platform")
if (reason := interpreter.why_not()) and not torch.cuda.is_available():
    pytest.skip(reason, allow_module_level=True)

from gradkern.kernels.settings import SOLVER_T
from gradkern.ops.triton import solvers as kernels

# NumPy, in the interpreter, which divides what will not be used.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
F64 = torch.float64
OPTIMAL = 1e-12
"""Some thousand roundings of the terms."""


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with interpreter.unwritten_is_nan():
        yield


def on(*tensors: Tensor) -> list[Tensor]:
    return [t.to(DEVICE) for t in tensors]


@pytest.mark.parametrize("T", [1, 2, 3, 5])
def test_bounded_problems_are_solved(T: int) -> None:
    """They are of full and of low rank; some need more than the plain rounds."""
    K, _, rows, _ = scaled(torch.cat([mixed(1, T, spreads=(0, 6)), integers(4, T)]))
    p = torch.where(rows, (K @ torch.randn(*K.shape[:-1], 1, dtype=F64)).squeeze(-1), 0.0)  # in the range of K
    v = kernels.active_set(*on(K, -p.unsqueeze(-1), p < 0)).cpu()
    residual = active_set.kkt_residual(K, p, v)
    at_best = active_set.kkt_residual(K, p, carried(active_set.nonnegative)(K, p))
    assert (residual <= 10 * at_best + OPTIMAL).all()
    assert residual.median() <= OPTIMAL


def test_problems_share_a_matrix() -> None:
    """UPGrad's problems do. The shared matrix is in memory once."""
    K = scaled(gramians("any", 1, 4, 4, 9)).K
    p = torch.randn(4, 4, 4, dtype=F64)
    v = kernels.active_set(*on(K[:, None], -p.unsqueeze(-1), p < 0)).cpu()
    for i in range(4):
        assert active_set.kkt_residual(K, p[:, i], v[:, i]).max() <= OPTIMAL


def test_problems_share_what_they_start_from() -> None:
    K = scaled(gramians("any", 1, 4, 4, 9)).K
    p, free, a = -torch.rand(4, 4, dtype=F64), torch.tensor([True, False, True, True]), torch.rand(4, dtype=F64) + 0.1
    v = kernels.active_set(*on(K, -p.unsqueeze(-1), free)).cpu()
    assert active_set.kkt_residual(K, p, v).max() <= OPTIMAL
    v = kernels.fair(*on(K + torch.eye(4), a), 1.0).cpu()
    assert_near(v * ((K + torch.eye(4)) @ v.unsqueeze(-1)).squeeze(-1), a.expand(4, 4), torch.ones(4, 4), OPTIMAL)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_problem_that_is_not_finite_spoils_no_other(bad: float) -> None:
    K = scaled(gramians("any", 0, 3, 3, 9)).K
    p = torch.randn(3, 3, dtype=F64) - 1
    K[1] = bad
    v = kernels.active_set(*on(K, -p.unsqueeze(-1), p < 0)).cpu()
    assert v[1].isnan().all()
    assert active_set.kkt_residual(K, p, v)[[0, 2]].max() <= OPTIMAL


@pytest.mark.parametrize("T", [1, 3, 7])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_fair_equations_are_met(T: int, gamma: float) -> None:
    K = torch.cat([scaled(gramians(kind, 0, 2, T, 3 * T)).K for kind in ("any", "common", "nearly equal")])
    a = 10 ** torch.randn(len(K), T, dtype=F64)
    v = kernels.fair(*on(K, a), gamma).cpu()
    goal = a * v**-gamma
    Kv = (K @ v.unsqueeze(-1)).squeeze(-1)
    assert_near(Kv, goal, goal + (K.abs() @ v.unsqueeze(-1)).squeeze(-1), OPTIMAL)


@pytest.mark.parametrize("T", [1, 2, 3, 6, 7])
def test_matrices_become_diagonal(T: int) -> None:
    M = torch.cat([mixed(1, T, spreads=(0,), ranks=(max(1, T // 2),)), torch.zeros(1, T, T, dtype=F64)])
    values, vectors = (x.cpu() for x in kernels.jacobi(M.to(DEVICE)))
    assert eigen.eigen_residual(M, values, vectors).max() <= OPTIMAL


@pytest.mark.parametrize("leading", [(), (2, 3), (0,)])
def test_any_leading_dimensions(leading: tuple[int, ...]) -> None:
    J = torch.randn(*leading, 3, 9, dtype=F64)
    M = J @ J.mT
    values, vectors = kernels.jacobi(M.to(DEVICE))
    assert values.shape == (*leading, 3)
    assert vectors.shape == M.shape
    a = torch.ones(*leading, 3, dtype=F64)
    assert kernels.fair(*on(M, a), 1.0).shape == a.shape
    assert kernels.active_set(*on(M, a.unsqueeze(-1), a > 0)).shape == a.shape


def test_larger_problems_go_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    T = SOLVER_T + 1
    for kernel in (kernels.active_set_kernel, kernels.fair_kernel, kernels.jacobi_kernel):
        monkeypatch.setattr(kernel, kernel.__name__.rsplit(".", 1)[1], None)
    K = scaled(gramians("common", 0, 1, T, 2 * T)).K
    p = -torch.ones(1, T, dtype=F64)
    v = kernels.active_set(*on(K, -p.unsqueeze(-1), p < 0)).cpu()
    assert active_set.kkt_residual(K, p, v).max() <= OPTIMAL
    w = kernels.fair(*on(K, -p), 1.0).cpu()
    assert fair.fair_residual(K, w).max() <= OPTIMAL
    values, vectors = (x.cpu() for x in kernels.jacobi(K.to(DEVICE)))
    assert eigen.eigen_residual(K, values, vectors).max() <= OPTIMAL


METHODS = {
    "mgda": (gk.MGDA, {"active_set"}),
    "cagrad": (gk.CAGrad, {"active_set"}),
    "upgrad": (gk.UPGrad, {"active_set"}),
    "dualproj": (gk.DualProj, {"active_set"}),
    "nash_mtl": (gk.NashMTL, {"fair"}),
    "fairgrad": (gk.FairGrad, {"fair"}),
    "aligned_mtl": (gk.AlignedMTL, {"jacobi"}),
    "imtl_g": (gk.IMTLG, {"jacobi"}),
    "config": (gk.ConFIG, {"jacobi"}),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_on_a_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU as if it were a device: the tensors' way through the solvers, with the kernels."""
    method, expected = METHODS[name]
    J = torch.randn(4, 12, dtype=F64) + torch.randn(12, dtype=F64)
    M = (J @ J.T).to(DEVICE)
    if DEVICE.type == "cuda":
        w = method().weights(M).cpu()
    else:
        monkeypatch.setattr(arrays, "on_host", lambda x: False)
        for solver in (active_set, fair, eigen):
            monkeypatch.setattr(solver, "on_device", lambda x: True)
        with interpreter.serving_the_cpu() as calls:
            w = method().weights(M)
        assert set(calls) == expected
    assert_near(w @ J, getattr(reference, name)(list(J)), (w.abs() @ J.abs()).max(), 1e-9)


def test_every_kernel_is_an_operator() -> None:
    served = {op.name for op in interpreter.triton_operators()}
    assert {operators.active_set.name, operators.fair.name, operators.jacobi.name} <= served
