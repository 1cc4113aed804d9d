"""The state of methods on running means: what it holds, what fits it, and what is refused."""

import io

import pytest
import torch
from torch import nn

import gradkern as gk
from tests.aggregators.history.states import METHODS, assert_same_state, each_method, states
from tests.models import MultiHead, problem


@each_method
def test_resumed_in_a_fresh_optimizer_it_goes_on_exactly(name: str) -> None:
    def run(opt: gk.SurgeryOptimizer, model: MultiHead, steps: range) -> None:
        for k in steps:
            opt.update(model.losses(x + k, y))

    (first, x, y), (second, _, _) = problem(), problem()
    opts = [
        gk.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), METHODS[name]()) for model in (first, second)
    ]
    run(opts[0], first, range(3))
    file = io.BytesIO()
    torch.save([opts[0].state_dict(), first.state_dict()], file)
    file.seek(0)
    saved, parameters = torch.load(file, weights_only=True)
    opts[1].load_state_dict(saved)
    second.load_state_dict(parameters)
    run(opts[0], first, range(3, 6))
    run(opts[1], second, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@each_method
def test_parameters_that_are_added_start_from_zero(name: str) -> None:
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    method = METHODS[name]()
    gk.backward([(a * (1 + t)).square().sum() for t in range(2)], [a, b], aggregator=method)
    assert method.sizes == {"means_float32": {0: 3}}
    before = method.state_dict()["means_float32"].clone()
    gk.backward([((a * (1 + t)).sum() + (b * (2 - t)).sum()).square() for t in range(2)], [a, b], aggregator=method)
    assert method.sizes == {"means_float32": {0: 3, 1: 2}}
    after = method.state_dict()["means_float32"]
    assert after.shape[1] == 2 * before.shape[1]


def test_another_number_of_tasks_or_another_size_is_refused_and_changes_nothing() -> None:
    method, J = gk.MConFIG(), torch.randn(3, 9)
    method(J)
    before = states(method)
    with pytest.raises(ValueError, match=r"the means of MConFIG are of 3 tasks, and this step has 2"):
        method(J[:2])
    with pytest.raises(ValueError, match=r"for parameter 0 are 9 numbers in means_float32.* is 8 numbers"):
        method(J[:, :8])
    with pytest.raises(ValueError, match=r"9 numbers in means_float32.* 9 numbers, torch.float64"):
        method(J.double())
    assert_same_state(states(method), before)


@each_method
def test_states_that_do_not_fit(name: str) -> None:
    method = METHODS[name]()
    method(torch.randn(3, 9))
    before, state = states(method), method.state_dict()
    wrong = [
        {"means_float32": torch.ones(3, 9)},
        {"means_float32": torch.ones(2, 64)},
        {"means_float32": torch.ones(3, 64).double()},
        {"means_float32": "x"},
        {"steps": torch.ones(2).double()},
        {"_extra_state": {}},
        {"_extra_state": {"means_float32": [[0, 100]]}},
        {"_extra_state": {"means_float32": 3}},
        {"_extra_state": {"others": [[0, 9]]}},
        {"_extra_state": None},
    ]
    for changed in wrong:
        with pytest.raises((TypeError, ValueError), match="state_dict must"):
            method.load_state_dict(dict(state) | changed)
        assert_same_state(states(method), before)


@each_method
def test_the_means_keep_their_dtype(name: str) -> None:
    method = METHODS[name]()
    method(torch.randn(3, 9))
    before = states(method)
    assert_same_state(states(method.half()), before)
