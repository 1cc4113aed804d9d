"""Tensors that are like others are recognized, and those that differ in anything that a step depends on are not."""

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradkern as gk
from gradkern import reference
from gradkern.gradients import layouts, recognition
from gradkern.gradients.layouts import layouts_of, recognized
from gradkern.gradients.recognition import comparison_with
from tests.tolerances import TOLERANCES, assert_near

ORDER = [[0, 1], [0, 1]]


def parameters() -> list[Tensor]:
    return [nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(3)), torch.randn(4, 4).requires_grad_()]


def test_tensors_of_equal_properties_are_the_same_in_a_list_and_in_a_tuple() -> None:
    compare = comparison_with(parameters())
    assert compare(*parameters())
    assert compare(*tuple(parameters()))


OTHERS: dict[str, Callable[[Tensor], object]] = {
    "class": lambda p: p.detach().clone().requires_grad_(),
    "subclass": lambda p: nn.Parameter(p.detach().as_subclass(type("Sub", (Tensor,), {}))),
    "dtype": lambda p: nn.Parameter(p.detach().double()),
    "device": lambda p: nn.Parameter(p.detach().to("meta")),
    "shape": lambda p: nn.Parameter(torch.randn(2, 8)),
    "strides": lambda p: nn.Parameter(p.detach().t()),
    "requires_grad": lambda p: nn.Parameter(p.detach(), requires_grad=False),
    "negation": lambda p: nn.Parameter(torch._neg_view(p.detach())),
    "layout": lambda p: nn.Parameter(p.detach().to_sparse()),
    "none": lambda p: None,
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_tensor_that_differs_in_one_property_is_not_the_same(other: str) -> None:
    params = parameters()
    assert not comparison_with(params)(OTHERS[other](params[0]), *params[1:])


def test_a_list_that_holds_a_tensor_twice_is_not_the_same() -> None:
    a, b, _ = parameters()
    c, d = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
    assert comparison_with([a, b, c])(a, b, d)
    assert not comparison_with([a, b, c])(a, b, a)


def test_a_comparison_keeps_no_tensor_alive() -> None:
    params = parameters()
    compare, dead = comparison_with(params), [weakref.ref(p) for p in params]
    del params
    assert [ref() for ref in dead] == [None] * 3
    assert compare(*parameters())


def test_parameters_are_recognized_until_something_differs() -> None:
    params = parameters()
    layouts = layouts_of(params)
    assert recognized(params) is layouts
    assert recognized(parameters()) is layouts
    params[0].data = params[0].data.t()
    assert recognized(params) is None
    other = layouts_of(params)
    assert other is not layouts
    assert recognized(params) is other


def test_a_gradient_dtype_of_its_own_is_noticed() -> None:
    params = [nn.Parameter(torch.randn(3).bfloat16())]
    layouts = layouts_of(params)
    params[0].grad_dtype = torch.float32
    assert recognized(params) is None
    assert layouts_of(params) is not layouts


def test_computed_tensors_are_not_recognized_as_leaves() -> None:
    leaves = [torch.randn(3).requires_grad_()]
    layouts_of(leaves)
    assert recognized([2 * leaves[0]]) is None


def test_nested_tensors_are_not_recognized() -> None:
    layouts_of(parameters())
    nested = torch.nested.nested_tensor([torch.randn(2), torch.randn(3)], requires_grad=True)
    assert recognized([nested, *parameters()[1:]]) is None


@pytest.mark.parametrize("absent", ["module", "class", "arguments"])
def test_steps_are_right_where_pytorch_cannot_compare(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Guards:
        class TensorGuards:
            def __init__(self) -> None:
                """Take other arguments than PyTorch's class does now."""

    monkeypatch.setattr(layouts, "_latest", {})
    monkeypatch.setattr(layouts, "_layouts", {})
    monkeypatch.setattr(recognition, "_guards", {"module": None, "class": object(), "arguments": Guards()}[absent])
    torch.manual_seed(0)
    a, b = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(2, 2))
    first = [torch.randn(5), torch.randn(2, 2)]
    rows = [first, [torch.randn_like(g) / 2 - g for g in first]]
    J = [torch.cat([g.flatten() for g in row]).double() for row in rows]
    expected = reference.pcgrad_update(J, ORDER)
    for _ in range(3):
        a.grad = b.grad = None
        gk.backward([(a * g).sum() + (b * h).sum() for g, h in rows], [a, b], aggregator=gk.PCGrad(order=ORDER))
        found = torch.cat([a.grad, b.grad.flatten()])
        assert_near(found, expected, J[0].abs() + J[1].abs(), TOLERANCES[torch.float32])
