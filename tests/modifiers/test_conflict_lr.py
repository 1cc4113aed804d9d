"""The learning rate by conflict: κ in closed form, and steps of optimizers against ones written by hand."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import gradkern as gk
from gradkern import reference
from tests.models import flat, problem, task_gradients
from tests.optim.test_optimizer import build, optimizers
from tests.problems import PROBLEMS
from tests.tolerances import assert_near

MODES = ["attenuate", "amplify"]
ORDER = [[0, 1, 2], [2, 0, 1], [1, 2, 0]]


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("T", [1, 2, 3, 8])
@pytest.mark.parametrize("reduce", ["mean", "min"])
@pytest.mark.parametrize("mode", MODES)
def test_kappa_is_the_references(mode: str, reduce: str, T: int, problem: str) -> None:
    J = PROBLEMS[problem](T, 40)
    kappa = gk.ConflictLR(mode, reduce).scale(gk.gramian(J))
    assert kappa.shape == ()
    # 1e-12: float64, a few roundings of cosines of some hundred terms.
    expected = torch.tensor(reference.step_scale(list(J), mode, reduce), dtype=torch.float64)
    assert_near(kappa, expected, 1.0, 1e-12)


def test_kappa_of_two_tasks() -> None:
    M = torch.tensor([[4.0, -3.0], [-3.0, 9.0]])
    assert gk.ConflictLR("attenuate").scale(M).item() == 0.5
    assert gk.ConflictLR("amplify").scale(M).item() == 1.5


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_where_it_is_not_finite_it_is_one(bad: float) -> None:
    M = torch.eye(3)
    M[0, 1] = M[1, 0] = bad
    M[1, 1] = abs(bad)
    for mode in MODES:
        for reduce in ("mean", "min"):
            assert gk.ConflictLR(mode, reduce).scale(M).item() == 1.0


def kappa_of(losses: list[Tensor], params: list[Tensor], mode: str) -> float:
    return reference.step_scale([flat(g, params) for g in task_gradients(losses, params)], mode, "mean")


@pytest.mark.parametrize("groups", ["model", "parameter"])
@pytest.mark.parametrize("mode", MODES)
def test_sgd_by_hand(mode: str, groups: str, back_end: str) -> None:
    """θ ← θ - κ α g, κ from the whole model whatever the groups, and for the heads too."""
    model, x, y = problem()
    inner = torch.optim.SGD(model.named_parameters(), lr=0.1)
    opt = gk.SurgeryOptimizer(inner, gk.PCGrad(order=ORDER), groups=groups, conflict_lr=gk.ConflictLR(mode))
    trunk = list(model.trunk.parameters())
    for _ in range(3):
        opt.zero_grad()
        losses = model.losses(x, y)
        kappa = kappa_of(losses, trunk, mode)
        assert abs(kappa - 1) > 1e-3  # far more than float32 rounds: without κ no test on this problem passes
        info = opt.backward(losses)
        assert info.step_scale is not None
        assert abs(info.step_scale.item() - kappa) < 1e-5  # a float32 Gramian
        expected = [p.detach() - 0.1 * kappa * p.grad for p in model.parameters()]
        opt.step()
        for p, e in zip(model.parameters(), expected, strict=True):
            assert_near(p.detach(), e, e.abs().max(), 1e-6)  # float32, a few roundings of the parameter


@pytest.mark.parametrize("mode", MODES)
def test_adam_by_hand(mode: str) -> None:
    """θ ← θ - κ α m̂ / (√v̂ + ε): the moments are of the gradients, which κ leaves alone."""
    model, x, y = problem()
    params = list(model.parameters())
    alpha, b1, b2, eps = 0.01, 0.9, 0.999, 1e-8
    inner = torch.optim.Adam(model.named_parameters(), lr=alpha, betas=(b1, b2), eps=eps)
    opt = gk.SurgeryOptimizer(inner, gk.PCGrad(order=ORDER), conflict_lr=gk.ConflictLR(mode))
    m, v = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    for step in range(1, 5):
        opt.zero_grad()
        losses = model.losses(x, y)
        kappa = kappa_of(losses, list(model.trunk.parameters()), mode)
        opt.backward(losses)
        expected = []
        for k, p in enumerate(params):
            m[k] = b1 * m[k] + (1 - b1) * p.grad
            v[k] = b2 * v[k] + (1 - b2) * p.grad**2
            update = m[k] / (1 - b1**step) / ((v[k] / (1 - b2**step)).sqrt() + eps)
            expected.append(p.detach() - kappa * alpha * update)
        opt.step()
        for p, e in zip(params, expected, strict=True):
            assert_near(p.detach(), e, 1.0, 1e-6)  # float32, parameters and updates of about 1


def scaled_by_hand(inner: torch.optim.Optimizer, kappa: Tensor) -> None:
    params = [p for group in inner.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in params]
    inner.step()
    with torch.no_grad():
        for p, b in zip(params, before, strict=True):
            p.copy_(torch.lerp(b, p, kappa))


OPTIONS: list[dict[str, Any]] = [{"foreach": False}, {"foreach": True}, {"fused": True}, {"amsgrad": True}]
CASES = [(kind, {}) for kind in optimizers() if kind.__name__ not in ("SparseAdam", "LBFGS")]
CASES += [(kind, options) for kind in (torch.optim.Adam, torch.optim.AdamW) for options in OPTIONS]
CASES += [(torch.optim.SGD, {"momentum": 0.9, **options}) for options in OPTIONS[:3]]


@pytest.mark.filterwarnings("ignore:the losses reach:UserWarning")  # Muon leaves the biases out
@pytest.mark.parametrize(("kind", "options"), CASES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_every_torch_optimizer(kind: type[torch.optim.Optimizer], options: dict[str, Any]) -> None:
    results = []
    for wrapped in (False, True):
        model, x, y = problem()
        inner = build(kind, model, **options)
        params = [p for group in inner.param_groups for p in group["params"]]
        opt = gk.SurgeryOptimizer(inner, gk.PCGrad(order=ORDER), conflict_lr=gk.ConflictLR("amplify"))
        for _ in range(3):
            if wrapped:
                opt.zero_grad()
                opt.backward(model.losses(x, y))
                opt.step()
            else:
                inner.zero_grad()
                info = gk.backward(model.losses(x, y), params, aggregator=gk.PCGrad(order=ORDER))
                scaled_by_hand(inner, gk.ConflictLR("amplify").scale(info.gramian))
        results.append([p.detach().clone() for p in params])
    for a, b in zip(*results, strict=True):
        assert_near(a, b, 1.0, 1e-6)  # float32, the same interpolation with its terms in another order


def test_a_closure_may_hold_the_backward_pass() -> None:
    model, x, y = problem()
    inner = torch.optim.SGD(model.named_parameters(), lr=0.1)
    opt = gk.SurgeryOptimizer(inner, gk.PCGrad(order=ORDER), conflict_lr=gk.ConflictLR())
    before = [p.detach().clone() for p in model.parameters()]
    infos = []

    def closure() -> float:
        opt.zero_grad()
        infos.append(opt.backward(model.losses(x, y)))
        return 0.0

    opt.step(closure)
    kappa = infos[0].step_scale.item()
    for p, b in zip(model.parameters(), before, strict=True):
        assert_near(p.detach(), b - 0.1 * kappa * p.grad, 1.0, 1e-6)  # float32


def test_without_conflict_or_pair_the_step_is_untouched() -> None:
    """κ = 1 exactly leaves the bits of the plain step: a single task has no partner."""
    results = []
    for conflict_lr in (None, gk.ConflictLR("amplify")):
        model, x, y = problem()
        inner = torch.optim.Adam(model.named_parameters(), lr=0.1)
        opt = gk.SurgeryOptimizer(inner, gk.PCGrad(), conflict_lr=conflict_lr)
        opt.backward([model.loss(0, x, y), None, None])
        opt.step()
        results.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_step_without_a_new_backward_pass_is_not_scaled_again() -> None:
    model, x, y = problem()
    inner = torch.optim.SGD(model.named_parameters(), lr=0.1)
    opt = gk.SurgeryOptimizer(inner, gk.PCGrad(order=ORDER), conflict_lr=gk.ConflictLR("amplify"))
    opt.backward(model.losses(x, y))
    opt.step()
    before = [p.detach().clone() for p in model.parameters()]
    opt.step()
    for p, b in zip(model.parameters(), before, strict=True):
        assert_near(p.detach(), b - 0.1 * p.grad, 1.0, 1e-6)  # float32, rounded once or twice


def test_a_step_that_the_scaler_skips_stays_skipped() -> None:
    model, x, y = problem()
    inner = torch.optim.SGD(model.named_parameters(), lr=0.1)
    opt = gk.SurgeryOptimizer(inner, gk.PCGrad(), conflict_lr=gk.ConflictLR())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = [p.detach().clone() for p in model.parameters()]
    opt.backward([scaler.scale(loss * torch.inf) for loss in model.losses(x, y)])
    scaler.step(opt)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("method", [gk.Sum(), gk.PCGrad(), gk.GradAttention(subset=8)], ids=repr)
def test_every_method_takes_it(method: gk.Aggregator) -> None:
    model, x, y = problem()
    inner = torch.optim.SGD(model.named_parameters(), lr=0.1)
    opt = gk.SurgeryOptimizer(inner, method, conflict_lr=gk.ConflictLR())
    losses = model.losses(x, y)
    kappa = kappa_of(losses, list(model.trunk.parameters()), "attenuate")
    before = [p.detach().clone() for p in model.parameters()]
    opt.backward(losses)
    opt.step()
    for p, b in zip(model.parameters(), before, strict=True):
        assert_near(p.detach(), b - 0.1 * kappa * p.grad, 1.0, 1e-5)  # a float32 Gramian


@pytest.mark.skipif(not torch.cuda.is_available(), reason="capturable optimizers are for GPUs; none on this machine")
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_capturable(kind: type[torch.optim.Optimizer]) -> None:
    results = []
    for capturable in (False, True):
        model, x, y = problem(device="cuda")
        inner = kind(model.named_parameters(), lr=0.01, capturable=capturable)
        opt = gk.SurgeryOptimizer(inner, gk.PCGrad(order=ORDER), conflict_lr=gk.ConflictLR())
        for _ in range(3):
            opt.zero_grad()
            opt.backward(model.losses(x, y))
            opt.step()
        results.append([p.detach() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        assert_near(a, b, 1.0, 1e-5)  # capturable Adam takes its bias corrections in float32


def test_kappa_is_never_read() -> None:
    with FakeTensorMode():
        model, x, y = problem()
        inner = torch.optim.SGD(model.named_parameters(), lr=0.1)
        opt = gk.SurgeryOptimizer(inner, gk.PCGrad(), conflict_lr=gk.ConflictLR())
        info = opt.backward(model.losses(x, y))
        assert info.step_scale is not None  # there is one to read
        opt.step()


def test_repr_is_exact() -> None:
    text = "ConflictLR(mode='amplify', reduce='min')"
    assert repr(eval(text, {"ConflictLR": gk.ConflictLR})) == text


anything = st.one_of(st.text(max_size=5), st.integers(), st.none(), st.sampled_from(["mean", "min", *MODES]))


@given(anything, anything)
def test_what_is_out_of_range_names_itself(mode: object, reduce: object) -> None:
    if mode in MODES and reduce in ("mean", "min"):
        gk.ConflictLR(mode, reduce)
    else:
        with pytest.raises(
            (TypeError, ValueError), match="mode must be .*got " if mode not in MODES else "reduce must be .*got "
        ):
            gk.ConflictLR(mode, reduce)


def test_a_norm_that_overflowed_is_no_pair_without_conflict() -> None:
    M = torch.tensor([[torch.inf, 1e30, 1e30], [1e30, 1.0, -0.5], [1e30, -0.5, 1.0]])
    assert gk.ConflictLR("amplify").scale(M).item() == 1.0


def test_gradients_cleared_are_no_longer_to_be_scaled() -> None:
    model, x, y = problem()
    inner = torch.optim.SGD(model.named_parameters(), lr=0.1)
    opt = gk.SurgeryOptimizer(inner, gk.PCGrad(order=ORDER), conflict_lr=gk.ConflictLR("amplify"))
    opt.backward(model.losses(x, y))
    opt.zero_grad()
    sum(model.losses(x, y)).backward()
    before = [p.detach().clone() for p in model.parameters()]
    opt.step()
    for p, b in zip(model.parameters(), before, strict=True):
        assert_near(p.detach(), b - 0.1 * p.grad, 1.0, 1e-6)  # float32, rounded once or twice
