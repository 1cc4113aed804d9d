"""Steps through activations over parameters used in any way, compared with whole rows."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradkern as gk
from gradkern.gradients.activations import cost
from tests.step.activations.conftest import MACHINES
from tests.step.activations.structures import STRUCTURES, deep, layers
from tests.step.activations.truth import FINISHES, NEAR, Mixed, check_grads, check_step, truth
from tests.step.activations.uses import USES, headed, loss_of

PROBLEMS = {**USES, **STRUCTURES}

pytestmark = pytest.mark.usefixtures("float64_by_default")
each_finish = pytest.mark.parametrize("finish", FINISHES)


@pytest.mark.usefixtures("way")
@each_finish
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_step_is_that_of_whole_rows(name: str, finish: str) -> None:
    problem = PROBLEMS[name]()
    check_step(problem.losses, problem.params, finish)


@each_finish
@pytest.mark.parametrize("name", STRUCTURES)
def test_the_graph_can_be_kept_and_grads_add_up(name: str, finish: str) -> None:
    problem = STRUCTURES[name]()
    trained = [p for p in problem.params if p.requires_grad]
    check_step(problem.losses, problem.params, finish, retain_graph=True)
    check_step_again = truth(problem.losses, trained, Mixed().weights)
    gk.backward(problem.losses, problem.params, aggregator=Mixed(), through="activations", finish=finish)
    for p in trained:
        p.grad = None if p.grad is None else p.grad / 2
    check_grads(trained, check_step_again)


@each_finish
def test_a_compiled_trunk(finish: str) -> None:
    """Its graph is one node, whose parameters have rows."""
    torch.compiler.reset()
    trunk = layers(4, 5, 4)
    torch._dynamo.reset()  # other tests may have compiled the same code as often as torch allows
    h = torch.compile(trunk, backend="aot_eager")(torch.randn(6, 4))
    params, losses = headed(list(trunk.parameters()), h)
    check_step(losses, params, finish)


@each_finish
def test_a_single_present_task_trains_alone(finish: str) -> None:
    params, losses = headed(*deep())
    expected = torch.autograd.grad(losses[1], params, retain_graph=True, allow_unused=True)
    with pytest.warns(UserWarning, match="one of 3 tasks is present"):
        gk.backward([None, losses[1], None], params, aggregator=gk.PCGrad(), through="activations", finish=finish)
    for p, g in zip(params, expected, strict=True):
        assert (p.grad is None) == (g is None)
        assert g is None or torch.allclose(p.grad, g, rtol=NEAR, atol=NEAR)


@each_finish
def test_the_graph_is_freed(finish: str) -> None:
    """A second step says so, as it does after a step over rows."""
    params, losses = headed(*deep())
    gk.backward(losses, params, aggregator=Mixed(), through="activations", finish=finish)
    with pytest.raises(
        ValueError, match=r"^(one of losses|losses\[0\]) has a graph that an earlier backward pass has freed"
    ):
        gk.backward(losses, params, aggregator=Mixed(), through="activations", finish=finish)


@each_finish
def test_parameters_that_are_not_among_params_get_nothing(finish: str) -> None:
    params, losses = headed(*deep())
    check_step(losses, params[1:], finish)
    assert params[0].grad is None


@each_finish
def test_without_a_shared_parameter_each_gets_its_own_gradient(finish: str) -> None:
    layers = [nn.Linear(4, 2) for _ in range(3)]
    params = [p for layer in layers for p in layer.parameters()]
    losses = [loss_of(layer(torch.randn(5, 4)), t) for t, layer in enumerate(layers)]
    with pytest.warns(UserWarning, match="no parameter is reached by two losses"):
        check_step(losses, params, finish, make=gk.PCGrad)


def test_checkpointing_is_refused_where_rows_are_cheaper_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What went in is not needed then. But whether a step is refused must not depend on the size of the batch."""
    monkeypatch.setattr(cost, "_CPU", MACHINES["direct"])
    lower, upper = layers(4, 5), layers(5, 4)
    h = upper(checkpoint(lower, torch.randn(6, 4), use_reentrant=False))
    params, losses = headed([*lower.parameters(), *upper.parameters()], h)
    with pytest.raises(ValueError, match="activation checkpointing"):
        check_step(losses, params, "kept")
