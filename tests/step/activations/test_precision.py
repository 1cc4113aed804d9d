"""Steps through activations in fewer bits, in several dtypes, and under autocast, compared with whole rows."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradkern as gk
from tests.step.activations.structures import headed, layers
from tests.step.activations.truth import FINISHES, check_grads, check_step, truth
from tests.step.activations.uses import Problem, loss_of
from tests.tolerances import assert_near

NEAR_FLOAT32 = 1e-5
"""Of sums of some 60 float32 terms in another order: each rounding is 6e-8 of a term, at each of five layers."""
NEAR_BFLOAT16 = 2**-5
"""Rows are rounded to 2⁻⁹ of themselves once, and what comes back at each layer again, of one task or of their sum."""
TOLERANCES = {torch.float32: NEAR_FLOAT32, torch.bfloat16: NEAR_BFLOAT16}

pytestmark = pytest.mark.usefixtures("way")
each_finish = pytest.mark.parametrize("finish", FINISHES)


class Steps(nn.Module):
    """The outputs of an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, 2, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:
        return self.lstm(h)[0]


TRUNKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "layers": lambda: (layers(4, 6, 4), torch.randn(12, 4)),
    "layers without a bias": lambda: (nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh()), torch.randn(12, 4)),
    "sequences": lambda: (layers(4, 6, 4), torch.randn(3, 5, 4)),
    "one example of many numbers": lambda: (layers(40, 30, 20), torch.randn(1, 40)),
    "images": lambda: (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 2, groups=2), nn.GroupNorm(2, 4)),
        torch.randn(2, 3, 5, 5),
    ),
    "images of channels last": lambda: (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 2)).to(memory_format=torch.channels_last),
        torch.randn(2, 3, 5, 5).contiguous(memory_format=torch.channels_last),
    ),
    "words": lambda: (nn.Sequential(nn.Embedding(9, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randint(9, (3, 5))),
    "attention": lambda: (
        nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True),
        torch.randn(2, 5, 4),
    ),
    "an LSTM": lambda: (Steps(), torch.randn(2, 5, 4)),
}
each_trunk = pytest.mark.parametrize("name", TRUNKS)


def problem(name: str, dtype: torch.dtype, autocast: bool = False) -> Problem:
    trunk, x = TRUNKS[name]()
    trunk.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        h = torch.tanh(trunk(x))
        heads = [nn.Parameter(torch.randn(h.shape[-1], 2).to(dtype)) for _ in range(3)]
        losses = [loss_of(h @ head, t) for t, head in enumerate(heads)]
    return Problem([*trunk.parameters(), *heads], list(losses))


@each_finish
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@each_trunk
def test_fewer_bits(name: str, dtype: torch.dtype, finish: str) -> None:
    params, losses = problem(name, dtype)
    info = check_step(losses, params, finish, TOLERANCES[dtype])
    assert info.gramian is not None
    assert info.gramian.dtype == torch.float32


@each_finish
@each_trunk
def test_autocast(name: str, finish: str) -> None:
    """Weights are float32, and what goes in and comes back is bfloat16."""
    params, losses = problem(name, torch.float32, autocast=True)
    check_step(losses, params, finish, NEAR_BFLOAT16)


@each_finish
@each_trunk
def test_autocast_around_the_step(name: str, finish: str) -> None:
    """Torch itself rounds what comes back in a float32 model then."""
    params, losses = problem(name, torch.float32)
    expected = truth(losses, params, gk.UPGrad().weights)
    with torch.autocast("cpu", torch.bfloat16):
        info = gk.backward(losses, params, aggregator=gk.UPGrad(), through="activations", finish=finish)
    assert_near(info.gramian, expected.gramian, expected.gramian.diagonal().max(), NEAR_BFLOAT16)
    check_grads(params, expected, NEAR_BFLOAT16)


@each_finish
def test_several_dtypes(finish: str) -> None:
    words, middle, top = nn.Embedding(9, 4).double(), nn.Linear(4, 5), nn.Linear(5, 4).bfloat16()
    h = torch.tanh(middle(torch.tanh(words(torch.randint(9, (3, 5)))).float()))
    h = torch.tanh(top(h.bfloat16())).double()
    params = [p for layer in (words, middle, top) for p in layer.parameters()]
    heads = [nn.Parameter(torch.randn(4, 2).double()) for _ in range(3)]
    losses = [loss_of(h @ head, t) for t, head in enumerate(heads)]
    check_step(losses, [*params, *heads], finish, NEAR_BFLOAT16)


@each_finish
def test_a_copy_in_fewer_bits(finish: str) -> None:
    """The gradient is rounded with the copy; the parameter's other use has all bits."""
    W, h = nn.Parameter(torch.randn(4, 4).double()), torch.randn(6, 4).double()
    h = torch.tanh((h.float() @ W.float()).double() @ W)
    heads = [nn.Parameter(torch.randn(4, 2).double()) for _ in range(3)]
    check_step([loss_of(h @ head, t) for t, head in enumerate(heads)], [W, *heads], finish, NEAR_FLOAT32)


@each_finish
def test_losses_of_several_dtypes(finish: str) -> None:
    trunk = layers(4, 5, 4)
    params, losses = headed(list(trunk.parameters()), trunk(torch.randn(6, 4)))
    given = [losses[0].double(), losses[1], losses[2].reshape(1)]
    check_step(given, params, finish, NEAR_FLOAT32)


@each_finish
def test_numbers_that_are_not_finite_reach_grad(finish: str) -> None:
    """A gradient scaler looks for them there."""
    trunk = layers(4, 5, 4)
    params, losses = headed(list(trunk.parameters()), trunk(torch.randn(6, 4)))
    losses[1] = losses[1] * torch.inf
    gk.backward(losses, params, aggregator=gk.PCGrad(), through="activations", finish=finish)
    assert not all(p.grad.isfinite().all() for p in trunk.parameters())
