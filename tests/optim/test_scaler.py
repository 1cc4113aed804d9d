"""Steps under a gradient scaler: one that it skips leaves the state of every method as it was."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import gradkern as gk
from gradkern.aggregators.methods import ONE_BATCH
from gradkern.compat.amp import GradVacAMP
from tests.models import problem
from tests.tolerances import assert_near

STATEFUL = [name for name, method in ONE_BATCH.items() if method.state]


class Overflow(torch.autograd.Function):
    """The identity, whose backward pass overflows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * torch.inf


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        is_same = a == b  # with CI set pytest would compare long bytes for an hour to show where they differ
        assert is_same


@pytest.mark.parametrize("inner", [torch.optim.SGD, gk.optim.AdamW])
@pytest.mark.parametrize("name", STATEFUL)
def test_a_skipped_update_leaves_the_state(name: str, inner: Callable[..., Any]) -> None:
    model, x, y = problem()
    method = ONE_BATCH[name].make()  # a fused step moves a generator of its own, since the host does not know better
    opt = gk.SurgeryOptimizer(inner(model.parameters(), lr=1e-3), method)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for _ in range(2):
        opt.update([scaler.scale(loss) for loss in model.losses(x, y)], scaler=scaler)
        scaler.update()
    before, params = copy.deepcopy(opt.state_dict()), [p.detach().clone() for p in model.parameters()]
    losses = model.losses(x, y)
    losses[1] = Overflow.apply(losses[1])
    opt.update([scaler.scale(loss) for loss in losses], scaler=scaler)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert_same([p.detach() for p in model.parameters()], params)
    assert_same(opt.state_dict(), before)
    opt.update([scaler.scale(loss) for loss in model.losses(x, y)], scaler=scaler)  # a step moves it again
    with pytest.raises(AssertionError):
        assert_same(opt.state_dict(), before)


LOOKING: dict[str, Callable[[], gk.Aggregator]] = {
    "uncertainty": lambda: gk.Uncertainty(3),
    "imtl-l": lambda: gk.IMTLL(3),
    "dwa": gk.DWA,
    "geometric-mean": gk.GeometricMean,
    "stch": lambda: gk.STCH(warmup=2),
    "famo": lambda: gk.FAMO(3, lr=0.5),
    "mgda": lambda: gk.MGDA("loss"),
    "normalized": lambda: gk.Normalized(gk.MGDA(), "loss"),
    "normalized-l2": lambda: gk.Normalized(gk.MGDA()),
    "fairgrad": gk.FairGrad,
    "nash-mtl": lambda: gk.NashMTL(0.1, update_every=2),
    "gradnorm": lambda: gk.GradNorm(3, lr=0.5),
    "pcd": lambda: gk.PCD(0.5, beta=0.5),
    "dbmtl": lambda: gk.DBMTL(0),  # without means, which would be of gradients of several scales
}


@pytest.mark.parametrize("inner", [torch.optim.SGD, gk.optim.AdamW])
@pytest.mark.parametrize("way", ["plain", "callables", "suppressed", "report"])
@pytest.mark.parametrize("name", LOOKING)
def test_methods_see_losses_and_products_without_the_scale(name: str, way: str, inner: Callable[..., Any]) -> None:
    """Steps are those without a scaler, whatever the scale, and so is all state; powers of two round nothing."""
    if way == "report" and not isinstance(LOOKING[name](), gk.aggregators.Scalarization):
        pytest.skip("it has the Gramian anyway")
    results = []
    for scaled in (False, True):
        model, x, y = problem()
        method: Any = LOOKING[name]()
        method.report = way == "report"
        params = [*model.parameters(), *method.parameters()]
        suppression = gk.Suppression(0.2, seed=0) if way == "suppressed" else None
        opt = gk.SurgeryOptimizer(inner(params, lr=0.01), method, suppression=suppression)
        for scale in (1.0, 2.0**10, 2.0**4, 2.0**4):
            scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scaled)

            def loss(t: int, model: Any = model, scaler: Any = scaler, x: Tensor = x, y: Tensor = y) -> Tensor:
                return scaler.scale(model.loss(t, x, y))

            losses = [partial(loss, t) if way == "callables" else loss(t) for t in range(3)]
            opt.update(losses, scaler=scaler if scaled else None)
            if name == "famo":
                method.after([model.loss(t, x, y).detach() for t in range(3)])
        means = name == "dbmtl"  # which are of the scaled gradients
        results.append(([p.detach().clone() for p in params], {} if means else dict(method.state_dict())))
    (expected, state), (found, found_state) = results
    for p, q in zip(expected, found, strict=True):
        assert_near(q, p, p.abs().max(), 1e-6)  # fused steps and sums round in another order
    for key in state:
        if isinstance(state[key], Tensor):
            assert_near(found_state[key].nan_to_num(), state[key].nan_to_num(), 1 + state[key].nan_to_num().abs(), 1e-6)


def test_a_skipped_update_leaves_masks_and_memory() -> None:
    model, x, y = problem()
    opt = gk.SurgeryOptimizer(
        torch.optim.SGD(model.parameters(), lr=1e-3),
        gk.PCGrad(generator=torch.Generator().manual_seed(0)),
        suppression=gk.Suppression(0.5, seed=0),
        memory=True,
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    opt.update([scaler.scale(loss) for loss in model.losses(x, y)], scaler=scaler)
    scaler.update()
    before = copy.deepcopy(opt.state_dict())
    losses = model.losses(x, y)
    losses[1] = Overflow.apply(losses[1])
    opt.update([scaler.scale(loss) for loss in losses], scaler=scaler)
    assert_same(opt.state_dict(), before)


def test_gradvac_under_amp_keeps_its_targets_if_a_head_overflows() -> None:
    """Heads are in no dot product, so the method cannot see the overflow; the scaler does."""
    model, x, y = problem()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    opt = GradVacAMP(3, torch.optim.SGD(model.parameters(), lr=1e-3), "cpu", scaler)

    def step(broken: bool) -> Tensor:
        hook = model.heads[1].weight.register_hook(lambda g: g * torch.inf) if broken else None
        opt.backward(model.losses(x, y))
        opt.step()
        if hook is not None:
            hook.remove()
        return opt.rho_T

    targets = step(broken=False)
    assert torch.equal(step(broken=True), targets)
    assert scaler.get_scale() == 2.0
    assert not torch.equal(step(broken=False), targets)
