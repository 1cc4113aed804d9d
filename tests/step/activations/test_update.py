"""Steps of an optimizer through activations, compared with torch's optimizer on gradients of whole rows."""

from typing import Any

import pytest
import torch

import gradkern as gk
from tests.models import MultiHead, problem
from tests.step.activations.truth import FINISHES, Mixed, truth

pytestmark = pytest.mark.usefixtures("float64_by_default")
each_finish = pytest.mark.parametrize("finish", FINISHES)
each_kind = pytest.mark.parametrize("kind", [gk.optim.AdamW, torch.optim.AdamW, torch.optim.SGD])
ROUNDED = 1e-9
"""AdamW divides by roots of squares, which multiplies rounding errors of small gradients."""


def twins() -> tuple[MultiHead, MultiHead, Any]:
    """Return two equal models, and a function from a step's number to its batch."""
    (model, x, y), (copy, _, _) = problem(), problem()
    return model, copy, lambda k: (x.roll(k, 1), y + k)


def assert_equal_models(model: MultiHead, copy: MultiHead) -> None:
    for p, q in zip(model.parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=ROUNDED)


def plain_kind(kind: Any) -> Any:
    return torch.optim.AdamW if kind is gk.optim.AdamW else kind


def set_grads(copy: MultiHead, batch: Any) -> None:
    params = list(copy.parameters())
    for p, g in zip(params, truth(copy.losses(*batch), params, Mixed().weights).grads, strict=True):
        p.grad = g.view_as(p)


@each_finish
@each_kind
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_an_update(kind: Any, max_norm: float | None, finish: str) -> None:
    model, copy, batch = twins()
    opt = gk.SurgeryOptimizer(kind(model.parameters(), lr=0.1), Mixed(), through="activations", finish=finish)
    plain = plain_kind(kind)(copy.parameters(), lr=0.1, **decay(kind))
    for k in range(3):
        info = opt.update(model.losses(*batch(k)), max_norm=max_norm)
        set_grads(copy, batch(k))
        if max_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(copy.parameters(), max_norm)
            assert float(info.total_norm) == pytest.approx(float(norm), rel=ROUNDED)
        plain.step()
        assert all(p.grad is None for p in model.parameters())
    assert_equal_models(model, copy)


def decay(kind: Any) -> dict[str, float]:
    """Return the weight decay of a kind of optimizer, whose default may differ from torch's."""
    default = kind([torch.zeros(1, requires_grad=True)], lr=0.1).defaults["weight_decay"]
    return {"weight_decay": default}


@each_finish
@each_kind
def test_a_gradient_scaler(kind: Any, finish: str) -> None:
    """Neither the method nor the optimizer sees the scale. The weights of this method depend on it."""
    model, copy, batch = twins()
    opt = gk.SurgeryOptimizer(kind(model.parameters(), lr=0.1), Mixed(), through="activations", finish=finish)
    plain = plain_kind(kind)(copy.parameters(), lr=0.1, **decay(kind))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for k in range(3):
        opt.update([scaler.scale(loss) for loss in model.losses(*batch(k))], scaler=scaler)
        scaler.update()
        set_grads(copy, batch(k))
        plain.step()
    assert_equal_models(model, copy)


@each_finish
@each_kind
def test_a_scaler_skips_an_overflow(kind: Any, finish: str) -> None:
    model, copy, batch = twins()
    opt = gk.SurgeryOptimizer(kind(model.parameters(), lr=0.1), Mixed(), through="activations", finish=finish)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    losses = model.losses(*batch(0))
    losses[1] = losses[1] * torch.inf
    opt.update([scaler.scale(loss) for loss in losses], scaler=scaler)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert_equal_models(model, copy)


@each_finish
def test_one_call_may_take_another_way(finish: str) -> None:
    model, copy, batch = twins()
    opt = gk.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), Mixed())
    plain = torch.optim.SGD(copy.parameters(), lr=0.1)
    for k, way in enumerate(({}, {"through": "activations", "finish": finish}, {})):
        opt.zero_grad()
        opt.backward(model.losses(*batch(k)), **way)
        opt.step()
        set_grads(copy, batch(k))
        plain.step()
    assert_equal_models(model, copy)


@each_finish
def test_backward_and_step(finish: str) -> None:
    model, copy, batch = twins()
    opt = gk.SurgeryOptimizer(
        torch.optim.AdamW(model.parameters(), lr=0.1), Mixed(), through="activations", finish=finish
    )
    plain = torch.optim.AdamW(copy.parameters(), lr=0.1)
    for k in range(3):
        opt.zero_grad()
        opt.backward(model.losses(*batch(k)))
        opt.step()
        set_grads(copy, batch(k))
        plain.step()
    assert_equal_models(model, copy)
