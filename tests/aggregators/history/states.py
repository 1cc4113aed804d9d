"""The methods on running means, and their states."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import gradkern as gk
from gradkern.aggregators.history.averaged import Averaged

METHODS: dict[str, Callable[[], Averaged]] = {"moco": gk.MoCo, "dbmtl": gk.DBMTL, "mconfig": gk.MConFIG}
each_method = pytest.mark.parametrize("name", METHODS)


def states(method: Averaged) -> dict[str, object]:
    return copy.deepcopy(dict(method.state_dict()))


def assert_same_state(a: dict[str, object], b: dict[str, object]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]) if isinstance(value, Tensor) else value == b[key], key
