"""Losses over the examples that have a label."""

import pytest
import torch

import gradkern as gk


@pytest.mark.parametrize("shape", [(6,), (3, 2)])
def test_the_mean_is_over_the_examples_with_a_label(shape: tuple[int, ...]) -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 31.0]).view(shape).requires_grad_()
    present = torch.tensor([True, False, True, False, False, True]).view(shape)
    loss = gk.masked_mean(values, present)
    assert loss is not None
    loss.backward()
    assert loss.item() == 12
    assert torch.equal(values.grad, present / 3)


def test_a_batch_without_labels_is_an_absent_task() -> None:
    trunk = torch.nn.Linear(3, 2)
    h = trunk(torch.ones(4, 3))
    no_labels = torch.zeros(4, dtype=torch.bool)
    losses = [h[:, 0].square().mean(), gk.masked_mean(h[:, 1].square(), no_labels)]
    assert losses[1] is None
    (expected,) = torch.autograd.grad(losses[0], trunk.weight, retain_graph=True)
    with pytest.warns(UserWarning, match="one of 2 tasks is present"):
        gk.backward(losses, trunk, aggregator=gk.PCGrad())
    assert torch.equal(trunk.weight.grad, expected)


def test_a_missing_label_has_no_gradient() -> None:
    """A mean with zeros for missing labels would be half of this."""
    x = torch.tensor([3.0, 5.0], requires_grad=True)
    loss = gk.masked_mean(x.square(), torch.tensor([False, True]))
    assert loss is not None
    (grad,) = torch.autograd.grad(loss, x)
    assert grad.tolist() == [0.0, 10.0]


@pytest.mark.parametrize("constant", [torch.zeros(()), torch.zeros((), requires_grad=True)])
def test_a_constant_for_an_absent_task_is_told_to_be_none(constant: torch.Tensor) -> None:
    layer = torch.nn.Linear(3, 1)
    with pytest.raises(ValueError, match=r"losses\[1\] reaches no parameter.*pass None for a task that is absent"):
        gk.backward([layer(torch.ones(2, 3)).sum(), constant], layer, aggregator=gk.PCGrad())
    assert layer.weight.grad is None


@pytest.mark.parametrize(
    ("values", "present", "kind", "text"),
    [
        (torch.ones(3), torch.ones(2, dtype=torch.bool), ValueError, r"present must have the shape of values, \(3,\)"),
        (torch.ones(3), torch.ones(3), TypeError, "present must be bool, got torch.float32"),
        (torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool), TypeError, "values must be floating"),
        ([1.0], torch.ones(1, dtype=torch.bool), TypeError, r"values must be a tensor, got \[1.0\]"),
    ],
)
def test_wrong_arguments(values: object, present: object, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        gk.masked_mean(values, present)
