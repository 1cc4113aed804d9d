"""A step without rows asks the device for no number: it runs on tensors without numbers, and by kernels."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import gradkern as gk
from tests.interpreter import interpreted
from tests.step.test_no_host_reads import RefusesReads, refused_methods

__all__ = ["refused_methods"]  # a fixture, which is used by its name

WAYS: dict[str, dict[str, Any]] = {
    "backward": {"through": "activations"},
    "kept": {"through": "activations", "finish": "kept"},
    "sketch": {"through": "activations", "gramian": gk.Sketch(2, seed=0)},
    "report": {"through": "activations", "finish": "kept", "gramian": gk.Sketch(2, seed=0, report=True)},
    "features": {"through": "features"},
    "examples": {"through": "features", "per_example": True},
}


class Sentences(nn.Module):
    """An embedding with padding, a convolution, and linear layers below three heads."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 8, padding_idx=0)
        self.conv = nn.Conv1d(8, 6, 3, padding=1)
        self.linear = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5))
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(3))

    def features(self, ids: Tensor) -> Tensor:
        return self.linear(self.conv(self.words(ids).mT).mT)


def step(way: dict[str, Any], method: gk.Aggregator) -> tuple[gk.SurgeryInfo, list[Tensor | None]]:
    model, ids = Sentences(), torch.randint(30, (4, 7))
    h = model.features(ids)
    losses = [(head(h) - t).square().mean() for t, head in enumerate(model.heads)]
    features = h if way["through"] == "features" else None
    info = gk.backward(losses, model, aggregator=method, features=features, **way)
    return info, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("way", WAYS)
def test_it_runs_on_tensors_without_numbers(way: str) -> None:
    with FakeTensorMode():
        info, grads = step(WAYS[way], gk.MGDA())
    assert info.gramian is not None
    assert info.gramian.shape == (3, 3)
    assert all(g is not None for g in grads)


@interpreted
@pytest.mark.parametrize("way", WAYS)
def test_the_triton_path_reads_nothing(way: str, request: pytest.FixtureRequest) -> None:
    method = gk.MGDA()
    step(WAYS[way], method)  # work that is done once: layouts
    request.getfixturevalue("refused_methods")
    with RefusesReads():
        step(WAYS[way], method)
