"""A step's Python calls: few, and few more with each parameter. They are counted, because times vary by machine."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gradkern as gk
from gradkern.step import flat_rows

T = 3
OURS = str(Path(gk.__file__).parent)


class Net:
    """A small net of n tensors, and an optimizer for each way to take a step."""

    def __init__(self, n: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*(layer for _ in range(n // 2) for layer in (nn.Linear(6, 6), nn.Tanh())))
        self.params = list(self.model.parameters())
        self.x, self.y = torch.randn(4, 6), torch.randn(T, 4, 6)
        self.method = gk.PCGrad()
        self.opt = gk.SurgeryOptimizer(gk.optim.AdamW(self.params), self.method)

    def steps(self) -> dict[str, Callable[[Any], object]]:
        """Return the ways to take a step, by name."""
        return {
            "of a list": lambda losses: gk.backward(losses, self.params, aggregator=self.method),
            "of a module": lambda losses: gk.backward(losses, self.model, aggregator=self.method),
            "of an optimizer": self.opt.backward,
            "update": self.opt.update,
        }

    def calls(self, step: str) -> int:
        """Return the number of calls of this library's functions in a step, the third one of its kind."""
        counts = []
        for _ in range(3):
            out = self.model(self.x)
            losses = [(out - target).square().mean() for target in self.y]
            self.model.zero_grad()
            counts.append(_calls(lambda given=losses: self.steps()[step](given)))
        return counts[-1]


def _calls(run: Callable[[], object]) -> int:
    count = 0

    def heard(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(OURS)

    sys.setprofile(heard)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize(
    ("step", "per_parameter", "total"), [("of a list", 0, 170), ("of a module", 0, 170), ("update", 1, 300)]
)
def test_a_small_step_makes_few_calls_however_many_tensors_it_has(step: str, per_parameter: int, total: int) -> None:
    """The calls are those of 16 tensors, and at most so many for each further one. (Once 4,000 with torch's own.)"""
    few, many = Net(16).calls(step), Net(64).calls(step)
    assert many <= few + per_parameter * 48
    assert few <= total


def test_rows_left_in_place_take_a_bounded_number_of_calls_for_each_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The PyTorch back end gathers and combines tensor by tensor, with some calls for each of three gradients."""
    monkeypatch.setattr(flat_rows, "LARGEST", 0)
    few, many = Net(16).calls("of a list"), Net(64).calls("of a list")
    assert many - few <= 45 * 48
