"""Sum, Mean and Constant: torch's own backward of the weighted sum, bit for bit."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import gradkern as gk
from tests.models import problem

METHODS = [
    (gk.Sum(), [1.0, 1.0, 1.0]),
    (gk.Sum([1.0, 0.4307, 1.6094]), [1.0, 0.4307, 1.6094]),
    (gk.Mean(), [1 / 3, 1 / 3, 1 / 3]),
    (gk.Constant([0.5, 0.0, -2.0]), [0.5, 0.0, -2.0]),
]


@pytest.mark.parametrize(("method", "weights"), METHODS)
def test_losses_as_torch_would(method: gk.Aggregator, weights: list[float], device: torch.device) -> None:
    model, x, y = problem(device=device)
    sum(w * loss for w, loss in zip(weights, model.losses(x, y), strict=True)).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    info = gk.backward(model.losses(x, y), model, aggregator=method)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))
    assert info.gramian is info.norms is info.cosines is info.conflicts is None
    assert torch.equal(info.weights.cpu(), torch.tensor(weights))
    assert torch.equal(info.losses, torch.stack(model.losses(x, y)))


@pytest.mark.parametrize(("method", "weights"), METHODS)
def test_callables_as_torch_would_one_after_another(
    method: gk.Aggregator, weights: list[float], device: torch.device
) -> None:
    model, x, y = problem(device=device)
    for t, w in enumerate(weights):
        (w * model.loss(t, x, y)).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    gk.backward([lambda t=t: model.loss(t, x, y) for t in range(3)], model, aggregator=method)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


def test_one_backward_pass_for_all_losses() -> None:
    model, x, y = problem()
    calls = []
    model.trunk[0].weight.register_hook(lambda g: calls.append(g.shape))
    gk.backward(model.losses(x, y), model, aggregator=gk.Sum())
    assert len(calls) == 1


def test_matrices_and_gramians(device: torch.device) -> None:
    J = torch.randn(3, 40, dtype=torch.float64, device=device)
    for method, weights in METHODS:
        w = torch.tensor(weights, dtype=torch.float64, device=device)
        assert torch.allclose(method(J), w @ J, rtol=1e-12)
        assert torch.equal(method.weights(gk.gramian(J).expand(2, 5, 3, 3)), w.expand(2, 5, 3))
        assert torch.allclose(method(J, torch.tensor([0, 7, 40])), w @ J, rtol=1e-12)


@pytest.mark.parametrize(("method", "weights"), METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_call_returns_weights_of_its_own(method: gk.Aggregator, weights: list[float], dtype: torch.dtype) -> None:
    """Kinds of Gramians that are known are not checked in full; all others still are."""
    T = len(weights)
    M = torch.ones(T, T, dtype=dtype)
    for _ in range(3):
        w = method.weights(M)
        assert w.dtype == dtype
        assert torch.equal(w, torch.tensor(weights, dtype=dtype))
        w.zero_()
    assert torch.equal(method.weights(M.expand(2, T, T)), torch.tensor([weights] * 2, dtype=dtype))
    assert method.weights(M.to("meta")).device.type == "meta"
    with FakeTensorMode() as mode:
        assert isinstance(method.weights(mode.from_tensor(M)), FakeTensor)
    for wrong, message in ((M.to_sparse(), "to_dense"), (M.int(), "float32 or float64"), (M.tolist(), "a tensor")):
        with pytest.raises(TypeError, match=message):
            method.weights(wrong)  # type: ignore[arg-type]
    for shape in ((T,), (T, T + 1), (0, 0)):
        with pytest.raises(ValueError, match=r"\(\.\.\., T, T\)"):
            method.weights(torch.ones(shape, dtype=dtype))


def test_an_absent_task_leaves_the_others_weights_alone() -> None:
    model, x, y = problem()
    (sum(model.losses(x, y)[:2]) / 3).backward()
    expected = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    info = gk.backward([*model.losses(x, y)[:2], None], model, aggregator=gk.Mean())
    for p, g in zip(model.parameters(), expected, strict=True):
        assert (p.grad is None) == (g is None)
        assert g is None or torch.allclose(p.grad, g, rtol=1e-6)  # one rounding of the division by 3
    assert info.losses.isnan().tolist() == [False, False, True]


def test_a_callable_that_fails_changes_nothing() -> None:
    model, x, y = problem()

    def broken() -> torch.Tensor:
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        gk.backward([lambda: model.loss(0, x, y), broken], model, aggregator=gk.Sum())
    assert all(p.grad is None for p in model.parameters())


def test_repr_is_exact() -> None:
    names = {"Sum": gk.Sum, "Mean": gk.Mean, "Constant": gk.Constant}
    for text in ("Sum(weights=None)", "Sum(weights=[1.0, 2.0])", "Mean()", "Constant(weights=[0.5, -1.0])"):
        assert repr(eval(text, names)) == text


def test_weights_of_the_wrong_length() -> None:
    model, x, y = problem()
    with pytest.raises(ValueError, match=r"weights has 2 entries for 3 tasks: \[1.0, 2.0\]"):
        gk.backward(model.losses(x, y), model, aggregator=gk.Constant([1, 2]))
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="weights has 2 entries for 3 tasks"):
        gk.Sum([1, 2])(torch.ones(3, 5))


NO_WEIGHTS = {
    "none": ([], ValueError, r"weights must hold a number at least, got \[\]"),
    "NaN": ([float("nan")], ValueError, r"weights\[0\] must be a number that is finite, got nan"),
    "infinity": ([1.0, float("inf")], ValueError, r"weights\[1\] must be a number that is finite, got inf"),
    "too large": ([10**400], ValueError, r"weights\[0\] must be a number that is finite, got 1000"),
    "letters": (["a"], TypeError, r"weights\[0\] must be a number, got 'a'"),
    "a string": ("12", TypeError, "weights must be a sequence of numbers, got '12'"),
    "bytes": (b"12", TypeError, "weights must be a sequence of numbers, got b'12'"),
    "bools": ([True, False], TypeError, r"weights\[0\] must be a number, got True"),
    "a bool tensor": (torch.tensor([True]), TypeError, r"weights\[0\] must be a number, got True"),
    "a set": ({1.0, 2.0}, TypeError, "weights must be a sequence of numbers, got {1.0, 2.0}"),
    "a number": (3, TypeError, "weights must be a sequence of numbers, got 3"),
    "a matrix": (torch.eye(2), TypeError, r"weights\[0\] must be a number, got \[1.0, 0.0\]"),
    "complex": ([1j], TypeError, r"weights\[0\] must be a number, got 1j"),
}


@pytest.mark.parametrize(("weights", "error", "message"), NO_WEIGHTS.values(), ids=NO_WEIGHTS)
@pytest.mark.parametrize("method", [gk.Constant, gk.Sum])
def test_weights_that_are_no_weights(
    method: Callable[[object], gk.Aggregator], weights: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        method(weights)


@pytest.mark.parametrize(
    "weights", [(1, 2.5), np.array([1, 2.5]), torch.tensor([1, 2.5]), [torch.tensor(1.0), np.float64(2.5)]]
)
def test_weights_of_any_kind_are_the_numbers_given(weights: Any) -> None:
    assert gk.Constant(weights)(torch.eye(2)).tolist() == [1.0, 2.5]
