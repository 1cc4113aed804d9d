"""The memory and the passes of a step through activations, by the allocations and the calls that it makes."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradkern as gk
from bench.memory import peak
from tests.step.activations.structures import layers
from tests.step.activations.truth import FINISHES, Mixed
from tests.step.activations.uses import loss_of

T = 8
SIZES = {"few examples": (32, 64), "many examples": (256, 16)}
"""Examples, and numbers of each. With few examples what comes back at a layer is smaller than a weight's gradient."""


class Channels(nn.Module):
    """A convolution of one pixel along the rows of a matrix."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(d, d, 1)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(h.view(-1, 8, h.shape[1]).mT).mT.reshape(h.shape)


class Sine(nn.Module):
    """A product with the sine of a weight."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d, d))

    def forward(self, h: Tensor) -> Tensor:
        return h @ self.weight.sin()


KINDS: dict[str, Callable[[int], nn.Module]] = {
    "Linear": lambda d: nn.Linear(d, d),
    "Conv1d": Channels,
    "LayerNorm": lambda d: nn.Sequential(nn.Linear(d, d), nn.LayerNorm(d)),
}
Step = Callable[[list[Tensor], list[Tensor]], object]


def taken(kind: str, size: str, depth: int, step: Step) -> float:
    """Return the peak of a step's memory, in gradients of one task at the output of one layer."""
    n, d = SIZES[size]
    trunk = nn.Sequential(*(module for _ in range(depth) for module in (KINDS[kind](d), nn.Tanh())))
    h = trunk(torch.randn(n, d))
    heads = [nn.Parameter(torch.randn(d)) for _ in range(T)]
    losses = [loss_of(h @ head, t) for t, head in enumerate(heads)]
    params = [*trunk.parameters(), *heads]
    return peak(lambda: step(losses, params), "cpu") / (h.element_size() * n * d)


def plain(losses: list[Tensor], params: list[Tensor]) -> None:
    torch.stack(losses).sum().backward(retain_graph=True)


def through(finish: str) -> Step:
    """Return a step that keeps the graph, as ``plain`` does, so that both free no activations."""
    return lambda losses, params: gk.backward(
        losses, params, aggregator=Mixed(), through="activations", finish=finish, retain_graph=True
    )


@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_keeps_no_layer(kind: str, size: str) -> None:
    """Twelve layers more take no memory besides the gradients of plain training, where to keep them takes T each."""
    for step in (plain, through("backward"), through("kept")):
        taken(kind, size, 1, step)  # the first step alone allocates some of its memory
    few, many = (taken(kind, size, depth, through("backward")) for depth in (4, 16))
    assert many - max(few, taken(kind, size, 16, plain)) < T / 2
    if size == "few examples":
        few, many = (taken(kind, size, depth, through("kept")) for depth in (4, 16))
        assert many - max(few, taken(kind, size, 16, plain)) > 6 * T


@pytest.mark.usefixtures("float64_by_default")
def test_rows_of_other_uses_are_there_one_tensor_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight has twice as many numbers as what comes back at its layer, and its sine is no layer's weight."""
    monkeypatch.setitem(KINDS, "sine", Sine)
    for step in (plain, through("backward")):
        taken("sine", "few examples", 1, step)
    few, many = (taken("sine", "few examples", depth, through("backward")) for depth in (4, 16))
    assert many - max(few, taken("sine", "few examples", 16, plain)) < 2 * T


@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize("size", SIZES)
def test_the_peak_of_a_stream(size: str) -> None:
    """One layer's gradients of all tasks come in, another's go out, and a few tensors of that size are between."""
    few, many = (taken("Linear", size, 8, step) for step in (plain, through("backward")))
    assert many - few < 6 * T


class Calls(TorchDispatchMode):
    """Counts the tensors that operators return, by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in PRODUCTS:
            self.products[tuple(out.shape)] += 1
        return out


PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.addmm_, torch.ops.aten.baddbmm)


@pytest.mark.parametrize("finish", FINISHES)
def test_a_weight_with_few_examples_has_one_product(finish: str) -> None:
    """With 2 examples and 60 × 50 numbers, dot products over examples are cheaper than T weights' gradients."""
    trunk, x = layers(60, 50, 60, 50), torch.randn(2, 60)
    h = trunk(x)
    heads = [nn.Parameter(torch.randn(50)) for _ in range(T)]
    losses = [loss_of(h @ head, t) for t, head in enumerate(heads)]
    with Calls() as calls:
        gk.backward(losses, [*trunk.parameters(), *heads], aggregator=Mixed(), through="activations", finish=finish)
    of_weights = calls.products[50, 60] + calls.products[60, 50]
    assert of_weights == 3, calls.products
    assert not any(shape in calls.products for shape in ((T, 50, 60), (T, 60, 50)))


TRANSPOSED: dict[str, Callable[[Tensor], Tensor]] = {
    "t": lambda W: W.t(),
    "T": lambda W: W.T,
    "mT": lambda W: W.mT,
    "transpose": lambda W: W.transpose(0, -1),
    "permute": lambda W: W.permute(-1, 0),
    "three times": lambda W: W.T.transpose(-1, -2).mT,
    "by one that does nothing": lambda W: W.transpose(1, -1).permute(0, -1).mT,
}


@pytest.mark.parametrize("finish", FINISHES)
@pytest.mark.parametrize("name", TRANSPOSED)
def test_a_transposed_weight_has_no_rows(name: str, finish: str) -> None:
    """Functional code writes the transpose in one of these ways, and 2 examples make one product cheaper than rows."""
    W, x = nn.Parameter(torch.randn(50, 60)), torch.randn(2, 60)
    heads = [nn.Parameter(torch.randn(50)) for _ in range(T)]
    h = (x @ TRANSPOSED[name](W)).tanh()
    losses = [loss_of(h @ head, t) for t, head in enumerate(heads)]
    with Calls() as calls:
        gk.backward(losses, [W, *heads], aggregator=Mixed(), through="activations", finish=finish)
    assert calls.products[50, 60] + calls.products[60, 50] == 1, calls.products


@pytest.mark.parametrize("finish", FINISHES)
def test_passes_through_the_trunk(finish: str) -> None:
    """Each task goes through it once, or all at once; with "backward" their weighted sum goes once more."""
    trunk = layers(4, 5, 4)
    h = trunk(torch.randn(6, 4))
    passes = []
    h.grad_fn.register_prehook(lambda grads: passes.append(1))
    heads = [nn.Parameter(torch.randn(4)) for _ in range(T)]
    losses = [loss_of(h @ head, t) for t, head in enumerate(heads)]
    gk.backward(losses, [*trunk.parameters(), *heads], aggregator=Mixed(), through="activations", finish=finish)
    at_most = T + (finish == "backward")
    assert 1 <= len(passes) <= at_most
