"""A fixture that decides on the way to a layer's dot products."""

from math import inf

import pytest

from gradkern.gradients.activations import cost
from gradkern.gradients.activations.cost import Machine, Sizes


class OnlyInner(Machine):
    """A machine that takes inner products of activations wherever they can be taken."""

    def direct(self, s: Sizes, combined: bool) -> float:
        return inf


class OnlyDirect(Machine):
    """A machine that takes each task's gradient of each weight."""

    def inner(self, s: Sizes, combined: bool) -> float:
        return inf


MACHINES = {"inner": OnlyInner(1.0, 1.0), "direct": OnlyDirect(1.0, 1.0)}


@pytest.fixture(params=MACHINES)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let each way be the cheaper one in turn, whatever the sizes are."""
    monkeypatch.setattr(cost, "_CPU", MACHINES[request.param])
    return request.param
