"""Tests of gradkern.compat.torchjd against TorchJD itself: the same seeds give the same steps."""

import copy
import io
import itertools
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

theirs: Any = pytest.importorskip("torchjd.aggregation", reason="TorchJD is not installed")
from torchjd.autogram import Engine  # noqa: E402
from torchjd.autojac import backward, jac_to_grad, mtl_backward  # noqa: E402
from torchjd.linalg import DualConeProjector  # noqa: E402

import gradkern as gk  # noqa: E402
from gradkern import reference  # noqa: E402
from gradkern.compat import torchjd as ours  # noqa: E402
from tests.interpreter import interpreted  # noqa: E402
from tests.models import problem  # noqa: E402
from tests.problems import conflicting  # noqa: E402
from tests.tolerances import assert_near  # noqa: E402


class Enumerating(DualConeProjector):
    """A user's own projector. It tries all sets of tight bounds and takes the best feasible solution."""

    def __call__(self, U: Tensor, G: Tensor) -> Tensor:
        rows = [self._projected(u, G.double()) for u in U.double().reshape(-1, len(G))]
        return torch.stack(rows).reshape(U.shape).to(U)

    def _projected(self, u: Tensor, G: Tensor) -> Tensor:
        values: list[tuple[float, Tensor]] = []
        for tight in itertools.product((False, True), repeat=len(u)):
            free = ~torch.tensor(tight)
            v = u.clone()
            v[free] = torch.linalg.solve(G[free][:, free], -G[free][:, ~free] @ u[~free])
            if (v >= u - 1e-9).all():
                values.append((float(v @ G @ v), v))
        return min(values, key=lambda pair: pair[0])[1]

    def __repr__(self) -> str:
        return "Enumerating()"


SHARED_PROJECTOR = Enumerating()
METHODS: dict[str, Callable[[ModuleType], Any]] = {
    "PCGrad": lambda jd: jd.PCGrad(),
    # With eps = 0 both compute the same; ours does not use eps.
    "GradVac": lambda jd: jd.GradVac(eps=0.0),
    "GradVac-slow": lambda jd: jd.GradVac(0.01, 0.0),
    "AlignedMTL": lambda jd: jd.AlignedMTL(),
    "AlignedMTL-rmse": lambda jd: jd.AlignedMTL(scale_mode="rmse"),
    "CAGrad": lambda jd: jd.CAGrad(0.5),
    "CR-MOGM": lambda jd: jd.GramianWeightedAggregator(jd.CRMOGMWeighting(jd.PCGradWeighting())),
    "DualProj": lambda jd: jd.DualProj(),
    "DualProj-preference": lambda jd: jd.DualProj(torch.tensor([0.1, 0.7, 2.0])),
    "DualProj-projector": lambda jd: jd.DualProj(projector=SHARED_PROJECTOR),
    "FairGrad": lambda jd: jd.FairGrad(1.0),
    "FairGrad-sum": lambda jd: jd.FairGrad(0),
    "IMTLG": lambda jd: jd.IMTLG(),
    "Krum": lambda jd: jd.Krum(0, 2),
    "MGDA": lambda jd: jd.MGDA(),
    "PCD": lambda jd: jd.PCD(0.1),
    "PCD-shares": lambda jd: jd.PCD(torch.tensor([0.5, 0.1]), 0.9, eps=0.01),
    "UPGrad": lambda jd: jd.UPGrad(),
    "UPGrad-preference": lambda jd: jd.UPGrad(torch.tensor([0.1, 0.7, 2.0])),
    "UPGrad-projector": lambda jd: jd.UPGrad(projector=SHARED_PROJECTOR),
}
SOLVED = ("CAGrad", "DualProj", "FairGrad", "IMTLG", "Krum", "NashMTL", "PCD", "UPGrad")
THEIR_ERROR = {"CAGrad": 1e-3, "FairGrad": 1e-7, "FairGrad-sum": 1e-10}
"""The error that TorchJD's solvers leave, if it is not rounding: Clarabel, and SciPy's least squares."""
DIFFERENTIABLE = ("AlignedMTL", "AlignedMTL-rmse", "CR-MOGM", "Krum", "MGDA")
each_method = pytest.mark.parametrize("name", METHODS)


def pair(name: str) -> tuple[Any, Any]:
    """Return TorchJD's class and ours."""
    try:
        return METHODS[name](theirs), METHODS[name](ours)
    except ImportError as error:
        pytest.skip(str(error))


def seeded(aggregator: Callable[[Tensor], Tensor], argument: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return aggregator(argument)


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@each_method
def test_the_same_seeds_give_the_same_updates(name: str, float64: None) -> None:
    a, b = pair(name)
    for seed in range(8):
        J = conflicting(3, 5 + 200 * seed)
        x, y = seeded(a, J, seed), seeded(b, J, seed)
        # 1e-10: roundings of 1e-16, enlarged by the condition of a Gramian of few columns and by GradVac's memory.
        assert_near(y, x, J.norm(), THEIR_ERROR.get(name, 1e-10))


@pytest.mark.parametrize("T", [1, 2, 4, 9, 40])
@pytest.mark.parametrize("name", ["PCGrad", "GradVac", "GradVac-slow"])
def test_for_every_number_of_tasks(name: str, T: int) -> None:
    """Compare updates for every T, and check that the generator ends in the same state as with TorchJD."""
    a, b = pair(name)
    for seed in range(4):
        J = conflicting(T, 60)
        x = seeded(a, J, seed)
        after = torch.rand(())
        assert_near(seeded(b, J, seed), x, J.norm() * T, 1e-10)
        assert torch.equal(torch.rand(()), after)
    # Targets start anew with another number of tasks.
    assert_near(seeded(b, J[:2], 5), seeded(a, J[:2], 5), J.norm(), 1e-10)


@each_method
def test_in_float32(name: str) -> None:
    a, b = pair(name)
    for seed in range(4):
        J = conflicting(3, 300).float()
        x, y = seeded(a, J, seed), seeded(b, J, seed)
        assert y.dtype == torch.float32
        # 1e-4: roundings of 6e-8, TorchJD's in the weights too, times the Gramian's condition, here below 100.
        assert_near(y, x, J.norm(), 1e-4)


@pytest.mark.parametrize("name", ["PCGrad", "GradVac", "IMTLG", "MGDA"])
def test_a_matrix_may_lie_in_memory_as_it_likes(name: str) -> None:
    a, b = pair(name)
    J = conflicting(3, 300)
    for layout in (J.T.contiguous().T, J.repeat_interleave(2, 1)[:, ::2], torch.cat((J, J), 1)[:, :300]):
        assert not layout.is_contiguous()
        assert_near(seeded(b, layout, 0), seeded(a, layout, 0), J.norm(), 1e-10)
    assert seeded(b, J[:, :0], 0).shape == (0,)


@interpreted
def test_the_kernels_do_it(triton_serves_the_cpu: list[str]) -> None:
    a, b = pair("GradVac")
    J = conflicting(3, 300)
    for seed in range(2):
        assert_near(seeded(b, J, seed), seeded(a, J, seed), J.norm(), 1e-10)
    assert triton_serves_the_cpu == ["gramian", "gradvac", "combine"] * 2
    a, b = pair("PCGrad")
    assert_near(seeded(b, J, 0), seeded(a, J, 0), J.norm(), 1e-10)
    assert triton_serves_the_cpu[6:] == ["gramian", "pcgrad", "combine"]


# In training.


def by_backward(model: Any, x: Tensor, y: Tensor, aggregator: Any) -> Tensor | None:
    trunk = list(model.trunk.parameters())
    backward(model.losses(x, y), inputs=trunk)
    return jac_to_grad(trunk, aggregator)


def by_gramians_of_parameters(model: Any, x: Tensor, y: Tensor, aggregator: Any) -> Tensor | None:
    trunk = list(model.trunk.parameters())
    backward(model.losses(x, y), inputs=trunk)
    return jac_to_grad(trunk, aggregator, optimize_gramian_computation=True)


def by_mtl_backward(model: Any, x: Tensor, y: Tensor, aggregator: Any) -> Tensor | None:
    h = model.trunk(x)
    mtl_backward([(head(h).squeeze(-1) - t).square().mean() for head, t in zip(model.heads, y, strict=True)], h)
    return jac_to_grad(model.trunk.parameters(), aggregator)


def by_autogram(model: Any, x: Tensor, y: Tensor, aggregator: Any) -> Tensor | None:
    engine = Engine(model.trunk, batch_dim=None)
    losses = torch.stack(model.losses(x, y))
    w = aggregator.gramian_weighting(engine.compute_gramian(losses))
    losses.backward(w)
    return w


def train(step: Callable[..., Tensor | None], aggregator: Any, steps: int, lr: float = 0.05) -> list[Tensor]:
    """Train and return the losses and weights of each step as one tensor, and the parameters at the end."""
    model, x, y = problem()
    opt = torch.optim.SGD(model.parameters(), lr=lr)
    seen: list[Tensor] = []
    for seed in range(steps):
        torch.manual_seed(seed)
        opt.zero_grad()
        w = step(model, x, y, aggregator)
        assert w is not None
        opt.step()
        with torch.no_grad():
            seen.append(torch.cat((torch.stack(model.losses(x, y)), w)))
    return [*seen, *(p.detach() for p in model.parameters())]


@pytest.mark.parametrize("step", [by_backward, by_gramians_of_parameters, by_mtl_backward, by_autogram])
@each_method
def test_training_goes_the_same_way(name: str, step: Callable[..., Tensor | None], float64: None) -> None:
    a, b = pair(name)
    for x, y in zip(train(step, a, 5), train(step, b, 5), strict=True):
        # 1e-9: as above, enlarged by five steps.
        assert_near(y, x, x.abs().max(), max(1e-9, 10 * THEIR_ERROR.get(name, 0)))


@pytest.mark.parametrize("name", ["PCGrad", "GradVac", "GradVac-slow", "UPGrad-projector"])
def test_training_in_float32(name: str) -> None:
    a, b = pair(name)
    for x, y in zip(train(by_mtl_backward, a, 5), train(by_mtl_backward, b, 5), strict=True):
        # 1e-3: roundings of 6e-8, enlarged by conditions up to 1e3 in each of five steps.
        assert_near(y, x, x.abs().max(), 1e-3)


@pytest.mark.parametrize("method", ["PCGrad", "GradVac"])
def test_two_hundred_steps_follow_the_same_losses(method: str, float64: None) -> None:
    """Use all defaults: GradVac then differs by TorchJD's eps, 1e-8 of the cosines for gradients of length 1."""
    a, b = (train(by_mtl_backward, getattr(jd, method)(), 200, lr=0.01)[:200] for jd in (theirs, ours))
    for x, y in zip(a, b, strict=True):
        assert_near(y[:3], x[:3], x[:3].min(), 1e-4)  # what was asked for
    assert a[-1][:3].sum() < 0.8 * a[0][:3].sum()


# As an interface.


def test_every_name_of_torchjd_is_here() -> None:
    names: dict[str, Any] = {}
    exec("from gradkern.compat.torchjd import *", names)
    for name in theirs.__all__:
        mine, its = getattr(ours, name), getattr(theirs, name)
        assert names[name] is mine
        assert issubclass(mine, its)
        assert mine.__name__ == name
        assert mine.__doc__
        on_gradkern = issubclass(its, theirs.GramianWeightedAggregator)
        assert on_gradkern == issubclass(mine, ours.GramianWeightedAggregator)
        weighting = name.removesuffix("Weighting") in (*SOLVED, "PCGrad", "GradVac") and name != "NashMTLWeighting"
        assert (mine is not its) == (on_gradkern or weighting)
    with pytest.raises(ImportError, match="PCGard"):
        exec("from gradkern.compat.torchjd import PCGard")


def test_a_later_name_of_torchjd_is_here_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theirs, "Later", object(), raising=False)
    with pytest.raises(AttributeError, match=r"'gradkern.compat.torchjd' has no attribute 'Later'"):
        _ = ours.Later
    monkeypatch.setattr(theirs, "__all__", theirs.__all__)
    theirs.__all__.append("Later")
    try:
        assert ours.Later is theirs.Later
    finally:
        theirs.__all__.remove("Later")


@each_method
def test_it_is_told_as_theirs_is(name: str) -> None:
    a, b = pair(name)
    assert (repr(b), str(b)) == (repr(a), str(a))
    J = conflicting(3, 20)
    seeded(a, J.float(), 0)
    seeded(b, J.float(), 0)
    assert b.state_dict().keys() == a.state_dict().keys()
    assert [n for n, _ in b.named_modules()] == [n for n, _ in a.named_modules()]
    assert repr(b.weighting) == repr(a.weighting)
    assert repr(pickle.loads(pickle.dumps(b))) == repr(a)


def test_attributes_are_theirs() -> None:
    a, b = theirs.GradVac(0.25, eps=1e-3), ours.GradVac(0.25, eps=1e-3)
    for method in (a, b):
        method.beta, method.eps = 0.75, 1e-5
        assert (method.gramian_weighting.beta, method.gramian_weighting.eps) == (0.75, 1e-5)
    assert repr(b) == repr(a) == "GradVac(beta=0.75, eps=1e-05)"
    for beta in (0.0, 1.0):
        b.beta = beta
        assert b.gramian_weighting.beta == beta
    assert isinstance(b.gramian_weighting, ours.GradVacWeighting)
    assert isinstance(ours.PCGrad().gramian_weighting, ours.PCGradWeighting)


@pytest.mark.parametrize(
    "attempt",
    [
        lambda jd: jd.GradVac(-0.1),
        lambda jd: jd.GradVac(1.1),
        lambda jd: jd.GradVac(float("nan")),
        lambda jd: jd.GradVac("much"),
        lambda jd: jd.GradVac(0.5, -1.0),
        lambda jd: jd.GradVacWeighting(beta=2),
        lambda jd: setattr(jd.GradVac(), "beta", 7),
        lambda jd: setattr(jd.GradVac(), "eps", -7),
        lambda jd: jd.PCGrad(3),
        lambda jd: jd.Sum(torch.ones(3)),
        lambda jd: jd.Constant(torch.ones(3, 3)),
        lambda jd: jd.Constant(),
        lambda jd: jd.Constant(torch.ones(3))(torch.ones(4, 5)),
        lambda jd: jd.MGDA(epsilon=0),
        lambda jd: jd.Krum(-1),
        lambda jd: jd.Krum(2)(torch.ones(3, 3)),
        lambda jd: jd.AlignedMTL(torch.ones(3, 3)),
        lambda jd: jd.AlignedMTL(scale_mode="most")(torch.eye(3)),
        lambda jd: jd.PCD(tau=2.0),
        lambda jd: jd.PCGrad()(torch.ones(3)),
        lambda jd: jd.GradVac()(torch.ones(2, 3, 4)),
    ],
)
def test_mistakes_raise_what_theirs_raise(attempt: Callable[[Any], object]) -> None:
    with pytest.raises(Exception) as its:  # noqa: PT011  (whatever theirs is)
        attempt(theirs)
    assert its.type is not AttributeError  # a name that neither has is not the user's mistake
    with pytest.raises(its.type):
        attempt(ours)


@pytest.mark.parametrize("name", ["PCGrad", "GradVac", "IMTLG"])
def test_a_matrix_of_another_kind_is_an_error_that_names_the_conversion(name: str) -> None:
    J = conflicting(3, 12)
    for given, convert in ((J.int(), "J.float()"), (J.cfloat(), "view_as_real"), (J.to_sparse(), "J.to_dense()")):
        with pytest.raises(TypeError, match=rf"J must be .*: pass .*{re.escape(convert)}"):
            getattr(ours, name)()(given)


def test_no_task_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"J must have shape \(T, P\) with T >= 1, got \(0, 4\)"):
        ours.PCGrad()(torch.ones(0, 4))
    with pytest.raises(ValueError, match=r"with T >= 1, got \(0, 0\)"):
        ours.PCGradWeighting()(torch.ones(0, 0))
    with pytest.raises(ValueError, match=r"with T >= 1, got \(0, 0\)"):
        ours.GradVacWeighting()(torch.ones(0, 0))


@each_method
def test_what_can_be_differentiated_is_as_theirs(name: str, float64: None) -> None:
    a, b = pair(name)
    its = conflicting(3, 12).requires_grad_()
    mine = its.detach().clone().requires_grad_()
    x, y = seeded(a, its, 0), seeded(b, mine, 0)
    assert x.requires_grad == y.requires_grad == (name in DIFFERENTIABLE)
    if x.requires_grad:
        x.square().sum().backward()
        y.square().sum().backward()
        assert its.grad is not None
        # 1e-10: as for the updates.
        assert_near(mine.grad, its.grad, its.grad.abs().max(), 1e-10)


@pytest.mark.parametrize("name", ["PCGrad", "GradVac"])
def test_a_hook_sees_the_weights(name: str) -> None:
    """Add a hook as jac_to_grad does, which returns the weights."""
    method = getattr(ours, name)()
    method.gramian_weighting.register_forward_hook(lambda module, given, w: torch.zeros_like(w))
    assert torch.equal(method(conflicting(3, 12)), torch.zeros(12, dtype=torch.float64))


# Without waiting for a device.


@pytest.mark.parametrize("name", ["PCGrad", "GradVac"])
def test_no_number_is_read(name: str) -> None:
    with FakeTensorMode():
        method = getattr(ours, name)()
        for _ in range(2):
            assert method(torch.empty(3, 40)).shape == (40,)


@pytest.mark.parametrize("name", ["PCGrad", "GradVac"])
def test_a_graph_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = getattr(ours, name)()
    J = conflicting(3, 12)
    method(J)
    state = copy.deepcopy(method.state_dict())
    monkeypatch.setattr(ours, "capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="a CUDA graph cannot draw on the CPU"):
        method(J)
    assert all(torch.equal(state[key], value) for key, value in method.state_dict().items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("name", ["PCGrad", "GradVac"])
def test_a_gpu_is_not_waited_for(name: str) -> None:
    its, mine = METHODS[name](theirs), METHODS[name](ours)
    J = conflicting(3, 1000).cuda()
    seeded(its, J, 0)
    seeded(mine, J, 0)  # compiles the kernels
    expected = seeded(its, J, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = seeded(mine, J, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_near(result, expected, J.norm(), 1e-10)


# Cases that TorchJD gets wrong.


def gradvacs(**arguments: float) -> tuple[Any, Any]:
    return theirs.GradVac(**arguments), ours.GradVac(**arguments)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_one_overflow_does_not_stop_gradvac_for_ever(bad: float) -> None:
    a, b = gradvacs()
    untouched = ours.GradVac()
    J = conflicting(3, 30)
    for seed, rows in enumerate((J, bad * J, J)):
        x, y = seeded(a, rows, seed), seeded(b, rows, seed)
        if rows is J:
            expected = seeded(untouched, rows, seed)
    # Theirs corrects nothing any more and gives the plain sum.
    assert_near(x, J.sum(0), J.norm(), 1e-12)
    assert a.state_dict()["gramian_weighting._phi_t"].isnan().any()
    assert torch.equal(y, expected)
    assert (y - J.sum(0)).norm() > 0.1 * J.norm()


def test_one_square_that_overflows_moves_no_target() -> None:
    method, J = after_steps(ours, 1)
    before = copy.deepcopy(method.state_dict())
    J = J.float() * torch.tensor([[1e20], [1.0], [1.0]])
    assert gk.gramian(J).isfinite().sum() == 8
    method(J)
    assert all(torch.equal(before[key], value) for key, value in method.state_dict().items())


def test_a_task_without_a_gradient_has_no_weight_of_a_hundred_million() -> None:
    """Check such a weight: with autogram it would scale the gradients of the heads too."""
    a, b = gradvacs()
    agreeing = torch.ones(2, 4) + 0.1 * torch.randn(2, 4)
    gone = agreeing * torch.tensor([[1.0], [0.0]])
    for rows in (agreeing, gone):
        x, y = (seeded(m.gramian_weighting, rows @ rows.T, 0) for m in (a, b))
    assert x[1] > 1e6
    assert torch.equal(y, torch.ones(2))
    # The target does not move either.
    assert a.state_dict()["gramian_weighting._phi_t"][0, 1] < 0.3
    assert b.state_dict()["gramian_weighting._phi_t"][0, 1] > 0.4


def test_short_gradients_are_corrected_as_long_ones_are() -> None:
    long = conflicting(3, 30)
    long /= long.norm(dim=1, keepdim=True)
    short = 1e-5 * long
    for jd, right in ((theirs, False), (ours, True)):
        results = [1e5 * seeded(jd.GradVac(), short, 0), seeded(jd.GradVac(), long, 0)]
        # 1e-9: rounding, since a change of scale may change nothing else.
        assert ((results[0] - results[1]).norm() < 1e-9) == right


def test_a_square_that_vanishes_is_not_divided_by() -> None:
    J = torch.tensor([[1.0, 0.0], [-1e-23, 1e-25]])
    assert not seeded(theirs.PCGrad(), J, 0).isfinite().all()
    # Ours gives the sum, with the second gradient projected onto the first.
    assert_near(seeded(ours.PCGrad(), J, 0), torch.tensor([1.0, 1e-25]), torch.tensor([1.0, 1e-25]), 1e-6)


def test_an_outlier_that_krum_leaves_out_stays_out() -> None:
    J = conflicting(4, 20).float()
    J[2] = torch.inf
    assert seeded(theirs.Krum(1), J, 0).isnan().all()
    y = seeded(ours.Krum(1), J, 0)
    assert any(torch.equal(y, J[i]) for i in (0, 1, 3))


@pytest.mark.parametrize("name", ["PCGrad", "GradVac", "MGDA"])
def test_weights_of_16_bit_gradients_have_more_bits(name: str) -> None:
    J = conflicting(4, 400).bfloat16()
    expected = seeded(getattr(ours, name)().weighting, J.double(), 0)
    x, y = (seeded(getattr(jd, name)().weighting, J, 0) for jd in (theirs, ours))
    # Roundings of 6e-8 in the Gramian and, with 8 bits, of 4e-3.
    assert (y - expected).norm() < 1e-5 * expected.norm()
    assert (x - expected).norm() > 1e-3 * expected.norm()
    update = getattr(ours, name)()
    assert_near(seeded(update, J, 0), expected @ J.double(), (expected.abs() @ J.double().abs()).max(), 4e-3)


def test_float16_does_not_overflow() -> None:
    J = 100 * conflicting(3, 400).half()
    # Theirs finds no conflict where dot products are infinite.
    assert_near(seeded(theirs.PCGrad(), J, 0), J.double().sum(0), J.double().abs().max(), 1e-3)
    expected = seeded(ours.PCGrad(), J.double(), 0)
    assert (expected - J.double().sum(0)).norm() > 0.1 * expected.norm()
    assert_near(seeded(ours.PCGrad(), J, 0), expected, expected.abs().max(), 1e-3)  # 11 bits of the result


def test_a_gramian_of_16_bits_gives_weights_of_its_own() -> None:
    M = gk.gramian(conflicting(3, 40))
    for weighting in (ours.PCGradWeighting(), ours.GradVacWeighting()):
        w = seeded(weighting, M.bfloat16(), 0)
        assert w.dtype == torch.bfloat16
        expected = seeded(type(weighting)(), M.bfloat16().double(), 0)
        assert_near(w, expected, expected.abs().max(), 4e-3)  # 8 bits


def test_it_is_the_papers_own_algorithm() -> None:
    """Repeat the algorithm by hand on vectors, in the orders drawn."""
    J = conflicting(4, 40)
    torch.manual_seed(3)
    orders = [torch.randperm(4).tolist() for _ in range(4)]
    assert_near(seeded(ours.PCGrad(), J, 3), torch.stack(reference.pcgrad(J, orders)).sum(0), J.norm(), 1e-12)
    torch.manual_seed(3)
    drawn = [torch.randperm(3).tolist() for _ in range(4)]
    orders = [[i] + [[j for j in range(4) if j != i][k] for k in drawn[i]] for i in range(4)]
    modified, targets = reference.gradvac(J, orders, torch.zeros(4, 4), 0.5, torch.finfo(torch.float64).eps)
    method = ours.GradVac()
    assert_near(seeded(method, J, 3), torch.stack(modified).sum(0), J.norm(), 1e-12)
    assert_near(method.state_dict()["gramian_weighting._phi_t"], targets, 1.0, 1e-12)


# GradVac's state.


def after_steps(jd: Any, n: int) -> tuple[Any, Tensor]:
    """Return a method that has made n steps, and the rows of the next step."""
    method = jd.GradVac(eps=0.0)
    rows = [conflicting(3, 30) for _ in range(n + 1)]
    for seed in range(n):
        seeded(method, rows[seed], seed)
    return method, rows[n]


def test_a_checkpoint_loads_into_a_fresh_instance() -> None:
    method, J = after_steps(ours, 3)
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    expected = seeded(method, J, 9)
    resumed, of_two_tasks = (ours.GradVac(eps=0.0) for _ in range(2))
    of_two_tasks(conflicting(2, 30))
    for other in (resumed, of_two_tasks):
        other.load_state_dict(state)
        assert torch.equal(seeded(other, J, 9), expected)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        theirs.GradVac(eps=0.0).load_state_dict(state)


def test_checkpoints_go_from_theirs_to_ours_and_back() -> None:
    torch.manual_seed(1)
    its, J = after_steps(theirs, 3)
    mine = ours.GradVac(eps=0.0)
    mine.load_state_dict(its.state_dict())
    assert_near(seeded(mine, J, 9), seeded(its, J, 9), J.norm(), 1e-10)
    back, _ = after_steps(theirs, 1)
    back.load_state_dict(mine.state_dict())
    assert_near(seeded(back, J, 10), seeded(mine, J, 10), J.norm(), 1e-10)


def test_reset_begins_again() -> None:
    method, J = after_steps(ours, 3)
    method.reset()
    assert method.state_dict() == ours.GradVac().state_dict() == {}
    assert torch.equal(seeded(method, J, 9), seeded(ours.GradVac(), J, 9))


def test_another_dtype_goes_on_from_the_same_targets() -> None:
    method, J = after_steps(ours, 3)
    wide = seeded(copy.deepcopy(method), J, 9)
    assert_near(seeded(method, J.float(), 9), wide, J.norm(), 1e-5)  # float32: roundings of 6e-8
    assert method.state_dict()["gramian_weighting._phi_t"].dtype == torch.float64


def test_a_step_in_inference_mode_is_a_step_like_others() -> None:
    method, J = after_steps(ours, 0)
    other = copy.deepcopy(method)
    with torch.inference_mode():
        seeded(method, J, 5)
    seeded(other, J, 5)
    assert torch.equal(seeded(method, J, 6), seeded(other, J, 6))


# As an optional dependency.


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_torchjd_it_is_said_what_to_install() -> None:
    code = """
import sys
sys.modules["torchjd"] = None
import gradkern
try:
    import gradkern.compat.torchjd
except ImportError as error:
    print(error)
"""
    assert run(code) == "gradkern.compat.torchjd needs TorchJD: pip install 'torchjd>=0.18'"


def test_gradkern_alone_does_not_import_it() -> None:
    code = "import sys, gradkern, gradkern.compat; print(any(m.partition('.')[0] == 'torchjd' for m in sys.modules))"
    assert run(code) == "False"
