"""Calls of the operators: straight to the implementation, or through the dispatcher where something has to see them.

The arguments are by name, so that every operator of the registry is tested, and a new one fails until its are here.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from gradkern.ops import operators
from gradkern.ops.arguments import AdamWState, AdamWStep, Coins, Mask, ProjectionArguments, TaskGrads
from gradkern.ops.registry import DEFAULT, Operator
from gradkern.ops.registry import operators as registered

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
NUMELS = [500, 1, 300, 77, 90]


def arguments(op: Operator[..., Any], masked: bool = True) -> list[Any]:
    """Return an operator's arguments, the same numbers each time: T = 3 tasks, S = 2 segments, one gradient missing."""
    torch.manual_seed(2)
    T, S, P = 3, 2, sum(NUMELS)
    J, X, targets = torch.randn(T, P), torch.randn(S, T, 5), torch.rand(S, T, T, dtype=torch.float64)
    order_keys, update_mask = torch.rand(S, T, T), torch.ones(T, dtype=torch.bool)
    grads: list[Tensor | None] = [torch.randn(n) for _ in range(T) for n in NUMELS]
    grads[2] = None
    named = {
        "J": J,
        "A": J,
        "B": torch.randn(2, P),
        "w": torch.randn(S, T),
        "W": torch.randn(S, 2, T),
        "M": X @ X.mT,
        "K": (X @ X.mT).double(),
        "R": torch.randn(S, T, 2, dtype=torch.float64),
        "free": torch.tensor([True, False, True]),
        "square": torch.ones(S, dtype=torch.float64),
        "a": torch.rand(T, dtype=torch.float64) + 0.1,
        "gamma": 0.5,
        "offsets": torch.tensor([0, 100, P]),
        "blocks": [J[:, :100].clone(), J[:, 100:].clone()],
        "rows": TaskGrads(grads, [0, 1, 0, 1, 0], S),
        "others": [torch.randn(n) for _ in range(2) for n in NUMELS],
        "grads": grads,
        "numels": NUMELS,
        "index": torch.tensor([3, 500, 807, 900]),
        "values": torch.randn(4),
        "mask": Mask([0, -1, 500, 804, 884], 1, torch.tensor([1, 2, 1 << 31])) if masked else None,
        "products_masked": True,
        "kept": torch.tensor(0),
        "out": [torch.zeros(n) for n in NUMELS],
        "coins": Coins([0, 500, 504, 804, 884], torch.tensor([1, 2])),
        "coefficients": torch.rand(2, T) if masked else None,
        "weights": torch.tensor([1.0, 0.0, 1.0]) if masked else None,
        "k": 1,
        "order_keys": order_keys,
        "partner": "all",
        "mean": False,
        "targets": targets,
        "update_mask": update_mask,
        "beta": 0.1,
        "eps": [1e-7, 2.2e-16] if masked else None,
        "method": ProjectionArguments(order_keys, "all", targets, update_mask, 0.1, mean=False),
        "state": AdamWState(
            [torch.randn(n) for n in NUMELS], [torch.rand(n) for _ in range(2) for n in NUMELS], [torch.ones(())] * 5
        ),
        "step": AdamWStep(torch.zeros(()), torch.ones(()), [1e-3, 0.9, 0.999, 0.01, 1e-8]),
    }
    if op.name.startswith("pcgrad.matrix"):
        named["order_keys"] = order_keys[:1]
    if op.name == "jacobi":
        named["M"] = named["K"]
    if op.name in ("combine.out", "pcgrad.matrix_out"):
        named["out"] = torch.zeros(P)
    return [named[name] for name in signature(op).parameters]


def changed(given: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return the arguments with every tensor changed."""
    return tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, given)


def tensors(*given: Any) -> list[Tensor]:
    """Return all tensors among arguments or results."""
    return [leaf for leaf in tree_flatten(given)[0] if isinstance(leaf, Tensor)]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(params=registered)
def op(request: pytest.FixtureRequest) -> Operator[..., Any]:
    """Each operator in turn."""
    return registered[request.param]


Roads = list[tuple[str, tuple[Any, ...]]]


@pytest.fixture
def roads(op: Operator[..., Any], monkeypatch: pytest.MonkeyPatch) -> Roads:
    """The roads that calls have taken, and with which arguments; nothing is computed."""
    taken: Roads = []
    monkeypatch.setattr(op, "overload", lambda *args: taken.append(("dispatcher", args)))
    monkeypatch.setitem(op.implementations, "cpu", lambda *args: taken.append(("straight", args)))
    return taken


@pytest.mark.parametrize("masked", [True, False])
def test_both_roads_lead_to_the_same(
    op: Operator[..., Any], masked: bool, back_end: str, request: pytest.FixtureRequest
) -> None:
    straight, dispatched = arguments(op, masked), arguments(op, masked)
    if not {DEFAULT, "cpu"} & op.implementations.keys():
        for call in (lambda: op(*straight), lambda: op.overload(*op.flattened(*dispatched))):
            with pytest.raises(NotImplementedError, match=op.name.split(".")[0]):
                call()
        return
    results = op(*straight), op.overload(*op.flattened(*dispatched))
    assert_same(tensors(results[0], straight), tensors(results[1], dispatched))
    for name, argument in zip(signature(op).parameters, straight, strict=True):
        assert name != "kept" or (argument > 0) == masked
    if back_end == "triton" and "cpu" in op.implementations:
        assert request.getfixturevalue("triton_serves_the_cpu") == [op.name] * 2


@needs_gpu
def test_both_roads_lead_to_the_same_on_the_device(op: Operator[..., Any]) -> None:
    straight, dispatched = (
        [a if name == "offsets" else changed(a, Tensor.cuda) for name, a in zip(names, arguments(op), strict=True)]
        for names in [list(signature(op).parameters)] * 2
    )
    results = op(*straight), op.overload(*op.flattened(*dispatched))
    assert_same(tensors(results[0], straight), tensors(results[1], dispatched))


@pytest.mark.parametrize("inside", [nullcontext, torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_a_call_goes_straight_to_the_function(
    op: Operator[..., Any], roads: Roads, inside: Callable[[], AbstractContextManager[Any]]
) -> None:
    given = arguments(op)
    parameters = changed(given, lambda t: torch.nn.Parameter(t) if t.is_floating_point() else t)
    with inside():
        assert op(*given) is None
        op(*parameters)
    assert [road for road, _ in roads] == ["straight"] * 2
    for (_, args), expected in zip(roads, (given, parameters), strict=True):
        assert all(a is b for a, b in zip(args, expected, strict=True))


class Watches(TorchDispatchMode):
    """A mode that gives results without numbers, and notes which of our operators it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "gradkern":
            return func(*args, **(kwargs or {}))
        self.seen.append(func.name())
        op = next(op for op in registered.values() if op.overload == func)
        return op.on_flat(op.__wrapped__)(*args)  # type: ignore[attr-defined]


def test_a_mode_sees_the_operator(op: Operator[..., Any]) -> None:
    with Watches() as mode:
        op(*arguments(op))
    assert mode.seen == [op.overload.name()]


@pytest.mark.parametrize("without_numbers", ["fake mode", "fake tensors", "meta tensors"])
def test_tensors_without_numbers_have_results_without_numbers(op: Operator[..., Any], without_numbers: str) -> None:
    given = arguments(op)
    declared = op.__wrapped__(*given)  # type: ignore[attr-defined]
    fake = FakeTensorMode()
    if without_numbers == "meta tensors":
        result = op(*changed(given, lambda t: t.to("meta")))
        assert all(t.is_meta for t in tensors(result))
    else:
        given = changed(given, fake.from_tensor)
        with fake if without_numbers == "fake mode" else nullcontext():
            result = op(*given)
    assert [(t.shape, t.dtype) for t in tensors(result)] == [(t.shape, t.dtype) for t in tensors(declared)]


class Unit(Tensor):
    """A tensor that is more than its numbers."""


def test_a_tensor_that_is_more_than_numbers_goes_to_the_dispatcher(op: Operator[..., Any], roads: Roads) -> None:
    """Its place among the arguments does not matter."""
    given = arguments(op)
    for tensor in tensors(given):
        roads.clear()
        unit = tensor.as_subclass(Unit)
        args = changed(given, lambda t, tensor=tensor, unit=unit: unit if t is tensor else t)
        op(*args)
        assert roads[0][0] == "dispatcher"
        assert all(a is b for a, b in zip(roads[0][1], op.flattened(*args), strict=True))


def test_a_view_of_negated_numbers_goes_to_the_dispatcher(op: Operator[..., Any], roads: Roads) -> None:
    """Lists hold no such views, because ``gradients/param_grads.py`` copies them."""
    given = arguments(op)
    for i, argument in enumerate(given):
        if isinstance(argument, Tensor) and argument.is_floating_point():
            op(*given[:i], torch._neg_view(argument), *given[i + 1 :])
    assert {road for road, _ in roads} <= {"dispatcher"}


def test_a_transform_sees_the_operator(op: Operator[..., Any], roads: Roads) -> None:
    def program(x: Tensor) -> Tensor:
        op(*arguments(op))
        return x.sum()

    torch.func.grad(program)(torch.ones(3))
    assert [road for road, _ in roads] == ["dispatcher"]


@pytest.mark.parametrize("name", ["pcgrad", "gramian.tensors", "combine.tensors", "combine.out", "pcgrad.matrix_out"])
def test_compiled_with_the_operator_in_the_graph(name: str) -> None:
    op, seen = registered[name], []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(lambda *args: op(*args), fullgraph=True, backend=backend)
    in_graph, eager = arguments(op), arguments(op)
    assert_same(tensors(compiled(*in_graph), in_graph), tensors(op(*eager), eager))
    assert op.overload in seen


def test_autocast_rounds_nothing() -> None:
    rows = arguments(operators.gramian_tensors)[0]
    expected = operators.gramian_tensors(rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(operators.gramian_tensors(rows), expected)


def test_results_on_negated_and_subclassed_tensors() -> None:
    M, order_keys, partner = arguments(operators.pcgrad)
    expected = operators.pcgrad(M, order_keys, partner)
    negated = torch._neg_view(-M)
    assert negated.is_neg()
    assert torch.equal(operators.pcgrad(negated, order_keys, partner), expected)
    assert torch.equal(operators.pcgrad(M.as_subclass(Unit), order_keys, partner).as_subclass(Tensor), expected)


def test_no_tensor_at_all() -> None:
    with pytest.raises(ValueError, match="grads holds no tensor"):
        operators.gramian_tensors(TaskGrads([None, None], [0], 1))
