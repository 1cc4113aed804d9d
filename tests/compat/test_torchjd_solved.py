"""Tests of the weightings of gradkern.compat.torchjd that gradkern's solvers compute: conditions and hard cases."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

theirs: Any = pytest.importorskip("torchjd.aggregation", reason="TorchJD is not installed")

import gradkern as gk  # noqa: E402
from gradkern.compat import torchjd as ours  # noqa: E402
from tests.aggregators.solvers.hard import gramians, mixed  # noqa: E402
from tests.problems import conflicting  # noqa: E402
from tests.tolerances import assert_near  # noqa: E402

CONDITION = 1e-9
METHODS: dict[str, Callable[[Any, int], Any]] = {
    "CAGrad": lambda jd, T: jd.CAGrad(0.5),
    "DualProj": lambda jd, T: jd.DualProj(),
    "FairGrad": lambda jd, T: jd.FairGrad(2.0),
    "IMTLG": lambda jd, T: jd.IMTLG(),
    "NashMTL": lambda jd, T: jd.NashMTL(T),
    "PCD": lambda jd, T: jd.PCD(0.3, beta=0.0),
    "UPGrad": lambda jd, T: jd.UPGrad(),
}
THEIR_ERROR = {"CAGrad": 1e-3, "NashMTL": 1e-4, "FairGrad": 1e-6}
"""CAGrad's solver stops at 1e-8 of its objective, whose root this is. NashMTL's equations hold to 1e-3."""
each_method = pytest.mark.parametrize("name", METHODS)
each_size = pytest.mark.parametrize("T", [1, 2, 3, 8, 20])


def rows_of(M: Tensor) -> Tensor:
    """Rows whose Gramian is M (T, T) to rounding."""
    values, vectors = torch.linalg.eigh(M)
    return vectors * values.clamp(0).sqrt()


@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem:UserWarning")
@each_size
@each_method
def test_as_torchjd_where_its_solver_is_installed(name: str, T: int) -> None:
    try:
        METHODS[name](theirs, T)
    except ImportError as error:
        pytest.skip(str(error))
    if name == "NashMTL" and T not in (2, 3):
        pytest.skip("TorchJD's NashMTL takes no single task, and its rounds do not always end for many")
    for _ in range(4):
        J, a, b = conflicting(T, 200), METHODS[name](theirs, T), METHODS[name](ours, T)
        x, y = a(J), b(J)
        assert_near(y, x, x.norm(), THEIR_ERROR.get(name, 1e-10))
    assert (repr(b), str(b)) == (repr(a), str(a))


@pytest.mark.parametrize("arguments", [{}, {"tau": 0.4, "beta": 0.5}, {"tau": 1.0, "beta": 0.9, "eps": 0.0}])
@each_size
def test_pcd_goes_on_as_theirs(T: int, arguments: dict[str, float]) -> None:
    """Through zeros, an overflow and checkpoints: the updates and the state are theirs."""
    a, b = theirs.PCD(**arguments), ours.PCD(**arguments)
    for step in range(6):
        J = conflicting(T, 60)
        J[T // 2] *= step != 2
        J *= torch.inf if step == 3 else 1.0
        x, y = a(J), b(J)
        if step == 3:
            assert x.isnan().all()
            assert y.isnan().all()
        else:
            assert_near(y, x, J.norm(), 1e-8)  # theirs meets constraints up to 1e-9
        assert a.state_dict().keys() == b.state_dict().keys()
        for key, value in a.state_dict().items():
            assert b.state_dict()[key].dtype == value.dtype
            assert_near(b.state_dict()[key].double(), value.double(), value.abs().max(), 1e-12)
        for one, other in ((a, b), (b, a)):  # each loads what the other has saved
            one.load_state_dict(other.state_dict())
    a.reset()
    b.reset()
    assert_near(b(J), a(J), J.norm(), 1e-8)


@pytest.mark.parametrize("T", [3, 5, 9, 20])
def test_krum_selects_what_theirs_does(T: int) -> None:
    # With T - 3 the closest two have the same score, so that one of them would be a matter of their order.
    for n_byzantine, n_selected in ((0, 1 if T > 3 else 2), (0, T), (T - 3, 2), (T // 4, 2)):
        a, b = theirs.Krum(n_byzantine, n_selected), ours.Krum(n_byzantine, n_selected)
        for J in (conflicting(T, 30), 1e3 * conflicting(T, 30), conflicting(T, 30).float()):
            # In float64: theirs takes roots of roundings in float32.
            expected = a.gramian_weighting(J.double() @ J.double().T)
            assert torch.equal(b.gramian_weighting(J.double() @ J.double().T), expected)
            assert b(J).dtype == J.dtype
            assert_near(b(J), (expected @ J.double()).to(J.dtype), J.norm(), 1e-6)
    J[T - 1, 2] = torch.inf
    assert ours.Krum(0, 1)(J).isfinite().all()
    with FakeTensorMode():
        assert ours.Krum(0, 1)(torch.empty(T, 9)).shape == (9,)


@each_size
@pytest.mark.parametrize("method", [ours.UPGradWeighting, ours.DualProjWeighting])
def test_projections_meet_their_conditions(method: Any, T: int) -> None:
    """v >= u, Gv >= 0, and one of both is an equation for every task; the weights are v, or the sum of T of them."""
    for M in mixed(1, T, spreads=(0, 3)):
        G = M / M.trace().clamp(1e-4) + 1e-4 * torch.eye(T)
        means = torch.eye(T, dtype=torch.float64) / T
        U = means if method is ours.UPGradWeighting else means.sum(0, keepdim=True)
        V = ours.QuadprogProjector()(U, M)
        slack = V @ G
        assert (V - U).min() >= 0
        assert slack.min() >= -CONDITION
        assert ((V - U) * slack).abs().max() <= CONDITION * (1 + V.square().sum())
        assert_near(method()(M), V.sum(0), 1.0, 1e-12)


def test_a_projector_is_told_as_theirs_is_and_a_given_one_is_kept() -> None:
    projector = ours.QuadprogProjector(norm_eps=0.1, reg_eps=0.01)
    assert repr(projector) == "QuadprogProjector(norm_eps=0.1, reg_eps=0.01)"
    assert ours.UPGrad(projector=projector).projector is projector
    method = ours.DualProj()
    method.projector = projector
    assert method.projector is projector
    assert repr(method) == f"DualProj(pref_vector=None, projector={projector!r})"
    method.projector = None
    assert repr(method.projector) == "QuadprogProjector(norm_eps=0.0001, reg_eps=0.0001)"
    with pytest.raises(ValueError, match="reg_eps must be non-negative"):
        ours.QuadprogProjector(reg_eps=-1.0)
    # A trace below norm_eps counts as zero: then nothing conflicts.
    J = 0.1 * conflicting(2, 10) / 10
    assert_near(ours.UPGrad(projector=projector)(J), J.mean(0), J.norm(), 1e-12)


@each_size
def test_cagrad_is_stationary(T: int) -> None:
    """f(w) = wᵀMe/T + c‖g₀‖ √(wᵀMw) on the simplex: ∇f_i >= f(w), because ∇fᵀw = f(w)."""
    e = torch.full((T,), 1 / T, dtype=torch.float64)
    for M in gramians("common", 0, 20, T, 3 * T):
        w = ours.CAGrad(0.5).gramian_weighting(M) - e
        assert w.min() >= 0
        w = w / w.sum()
        radius = 0.5 * (e @ M @ e).sqrt()
        slope = M @ e + radius * (M @ w) / (w @ M @ w).sqrt()
        assert (w @ slope - slope).max() <= CONDITION * slope.abs().max()


def test_cagrad_keeps_torchjds_rules_for_short_gradients() -> None:
    M = gramians("any", 0, 1, 3, 9)[0]
    assert torch.equal(ours.CAGrad(0.5, 1e-4).gramian_weighting(M * 1e-5 / M.trace()), torch.zeros(3).double())
    opposite = torch.tensor([[1.0, -2.0], [-2.0, 4.0]])  # no vector lowers both, and the ball has 0
    assert torch.equal(ours.CAGrad(2.0).gramian_weighting(opposite), torch.zeros(2))
    assert_near(ours.CAGrad(0.0).gramian_weighting(M), torch.full((3,), 1 / 3, dtype=torch.float64), 1.0, 1e-8)


@each_size
def test_nash_and_fairgrad_meet_their_equations(T: int) -> None:
    for M in gramians("common", 0, 10, T, 3 * T):
        w = ours.NashMTL(T, max_norm=0).weighting(rows_of(M))
        assert_near((M / M.norm() @ w) * w, torch.ones(T), 1.0, 1e-8)  # rows_of rounds
        for alpha in (0.5, 1.0, 2.0):
            w = ours.FairGrad(alpha).gramian_weighting(M)
            assert_near((M @ w) * w ** (1 / alpha), torch.ones(T), 1.0, CONDITION)
    with pytest.raises(ValueError, match=r"alpha must be a number that is at least 0 and finite, got -1"):
        ours.FairGrad(-1)


def test_nash_keeps_its_solution_and_cuts_the_update() -> None:
    first, second = conflicting(3, 40), conflicting(3, 40)
    method = ours.NashMTL(3, max_norm=0.0, update_weights_every=2)
    free = ours.NashMTL(3, max_norm=0)
    w = method.weighting(first)
    assert torch.equal(method.weighting(second), w)
    assert torch.equal(method.weighting(second), free.weighting(second))
    method.reset()
    assert torch.equal(method.weighting(first), w)
    cut = ours.NashMTL(3, max_norm=0.25)
    assert cut(first).norm().item() == pytest.approx(0.25, rel=1e-12)
    assert_near(cut(first) / 0.25, free(first) / free(first).norm(), 1.0, 1e-12)
    for wrong in ({"n_tasks": 0}, {"max_norm": -1}, {"update_weights_every": 0}, {"optim_niter": 0}):
        (argument,) = wrong
        with pytest.raises(ValueError, match=f"{argument} must be "):
            ours.NashMTL(**{"n_tasks": 2} | wrong)
        with pytest.raises(ValueError, match=f"{argument} must be "):
            setattr(cut, argument, wrong[argument])
    with pytest.raises(ValueError, match=r"matrix must have n_tasks=3 rows, got \(2, 40\)"):
        cut(first[:2])


@each_method
def test_an_overflow_shows_and_is_not_remembered(name: str) -> None:
    J, method = conflicting(3, 40), METHODS[name](ours, 3)
    broken = J.clone()
    broken[1, 3] = torch.inf
    assert not method(broken).isfinite().any()
    expected = METHODS[name](ours, 3)(J)
    assert torch.equal(method(J), expected)


def test_nash_does_not_remember_an_overflow() -> None:
    method, J = ours.NashMTL(3, 0, update_weights_every=2), conflicting(3, 40)
    assert method(J * torch.nan).isnan().all()
    assert torch.equal(method.weighting(J), torch.ones(3).double())  # the weights it began with


@each_method
def test_16_bits_and_low_rank(name: str) -> None:
    J, method = conflicting(4, 40), METHODS[name](ours, 4)
    assert method(J.bfloat16()).dtype == torch.bfloat16
    assert_near(method(J.float()), METHODS[name](ours, 4)(J), J.norm(), 1e-4)
    for rows in (J[:1].expand(4, 40), torch.cat((J[:2], J[:2])), 0 * J):
        assert METHODS[name](ours, 4)(rows.contiguous()).isfinite().all()


@each_method
def test_no_number_is_read(name: str) -> None:
    with FakeTensorMode():
        method = METHODS[name](ours, 3)
        assert method(torch.empty(3, 40)).shape == (40,)


def test_no_solver_library_is_needed() -> None:
    code = """
import sys
for name in ("quadprog", "qpsolvers", "cvxpy", "clarabel", "ecos", "scipy"):
    sys.modules[name] = None
import torch
from gradkern.compat import torchjd as jd
J = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
for method in (jd.CAGrad(0.5), jd.NashMTL(2), jd.UPGrad(), jd.DualProj(), jd.FairGrad(1.0), jd.IMTLG()):
    assert method(J).isfinite().all(), method
print(jd.UPGrad()(J).tolist(), jd.UPGradWeighting()(J @ J.T).tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # From the documentation of torchjd.aggregation.
    update, weights = (torch.tensor(values) for values in eval(done.stdout.strip().replace("] [", "], [")))
    torch.testing.assert_close(update, torch.tensor([0.2929, 1.9004, 1.9004]), atol=5e-5, rtol=0)
    torch.testing.assert_close(weights, torch.tensor([1.1109, 0.7894]), atol=5e-5, rtol=0)


@pytest.mark.parametrize("given", ["theirs", "theirs, a class", "ours", "ours, a class"])
def test_an_optimizer_names_the_twin(given: str) -> None:
    kind = (theirs if given.startswith("theirs") else ours).MGDA
    aggregator = kind if given.endswith("class") else kind()
    p = torch.nn.Parameter(torch.ones(2))
    message = r"aggregator must be a gradkern.Aggregator, got .*MGDA.*: pass gradkern.MGDA\(...\)"
    with pytest.raises(TypeError, match=message):
        gk.SurgeryOptimizer(torch.optim.SGD([p], 0.1), aggregator)
    with pytest.raises(TypeError, match=message):
        gk.backward([p.sum(), -p.sum()], [p], aggregator=aggregator)
    assert p.grad is None


@pytest.mark.parametrize("module", [theirs, ours], ids=["theirs", "ours"])
@pytest.mark.parametrize(
    ("make", "twin"),
    [
        (lambda jd: jd.Random(), "RGW"),
        (lambda jd: jd.RandomWeighting, "RGW"),
        (lambda jd: jd.CRMOGMWeighting(jd.MGDAWeighting()), "Smoothed"),
        (lambda jd: jd.MGDAWeighting(), "MGDA"),
        (lambda jd: jd.KrumWeighting(0), "Krum"),
        (lambda jd: ours.UPGradWeighting(), "UPGrad"),
        (lambda jd: ours.GradVacWeighting, "GradVac"),
        (lambda jd: type("Nash_MTL", (), {})(), "NashMTL"),  # LibMTL's spelling
    ],
)
def test_an_optimizer_names_the_twin_of_another_name(module: Any, make: Callable[[Any], Any], twin: str) -> None:
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match=rf"aggregator must be a gradkern.Aggregator, .*: pass gradkern.{twin}\(...\)"):
        gk.SurgeryOptimizer(torch.optim.SGD([p], 0.1), make(module))


def test_every_method_of_torchjds_has_a_twin_in_the_error_or_none_here() -> None:
    """Of all its classes, these alone have no method here, or are bases."""
    without = set()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], 0.1)
    for name in theirs.__all__:
        with pytest.raises(TypeError, match=r"aggregator must be a gradkern.Aggregator") as error:
            gk.SurgeryOptimizer(optimizer, getattr(ours, name))
        if "pass gradkern." not in str(error.value):
            without.add(name)
    assert without <= {
        "Aggregator",
        "ExcessMTL",
        "ExcessMTLWeighting",
        "GramianWeightedAggregator",
        "Stateful",
        "WeightedAggregator",
        "Weighting",
    }


def test_an_optimizer_names_what_makes_a_method_of_a_name() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], 0.1)
    with pytest.raises(TypeError, match=r"got 'pcgrad': pass gradkern.aggregator\('pcgrad'\)"):
        gk.SurgeryOptimizer(optimizer, "pcgrad")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got 3: the command 'gradkern methods' lists them"):
        gk.SurgeryOptimizer(optimizer, 3)  # type: ignore[arg-type]
