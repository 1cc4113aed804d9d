"""What a step through activations refuses: it says why and what to write instead, before any pass has run."""

import copy
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import gradkern as gk
from tests.ops.test_out import assert_equal_states
from tests.step.activations.structures import layers
from tests.step.activations.truth import FINISHES


class Watched(torch.autograd.Function):
    """A loss, with a count of the backward passes that go through it."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, passes: list[int]) -> Tensor:
        ctx.passes = passes
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        ctx.passes[0] += 1
        return g, None


class Model(nn.Module):
    """A trunk of two layers and three heads, each ``.grad`` of which holds something.

    It has so few examples that no layer is cheaper by rows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lower, self.upper = layers(40, 30), layers(30, 20)
        self.heads = nn.ModuleList(nn.Linear(20, 2) for _ in range(3))
        self.x, self.passes = torch.randn(2, 40), [0]
        for p in self.parameters():
            p.grad = torch.full_like(p, 7.0)

    def losses(self, run: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor] = lambda f, h: f(h)) -> list[Tensor]:
        """Return the losses, with the lower layer run by ``run``."""
        h = self.upper(run(self.lower, self.x))
        return [Watched.apply((head(h) - t).square().mean(), self.passes) for t, head in enumerate(self.heads)]


class Refused(NamedTuple):
    """A step that is refused.

    Attributes:
        arguments: returns its arguments beside the model and PCGrad; it may change the model.
        named: what the message says of the argument and its value.
        instead: what the message says to write.
        finishes: the ways to end that refuse it.
    """

    arguments: Callable[[Model], dict[str, Any]]
    named: str
    instead: str
    finishes: list[str] = FINISHES


ROWS = r"through=['\"]rows['\"]"
KEPT = r"finish=['\"]kept['\"]"


def halved(run: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    with saved_tensors_hooks(lambda x: x / 2, lambda x: x * 2):
        return run(h)


def of_method(name: str, *arguments: Any) -> Refused:
    return Refused(lambda m: {"aggregator": getattr(gk, name)(*arguments)}, rf"aggregator={name}\(", ROWS)


def hooked(m: Model, p: Tensor) -> dict[str, Any]:
    p.register_hook(lambda g: 2 * g)
    return {}


REFUSED: dict[str, Refused] = {
    "a callable": Refused(
        lambda m: {"losses": [*m.losses()[:2], lambda: m.losses()[2]]}, "losses that are callables", ROWS
    ),
    "callables": Refused(
        lambda m: {"losses": [lambda t=t: m.losses()[t] for t in range(3)]}, "losses that are callables", ROWS
    ),
    "suppression of all": Refused(
        lambda m: {"suppression": gk.Suppression(0.5, scope="all")}, r"suppression=.*scope='all'", "scope='update'"
    ),
    "suppression of the update": Refused(
        lambda m: {"suppression": gk.Suppression(0.5)}, r"suppression=Suppression\(", KEPT, ["backward"]
    ),
    "GradAttention": of_method("GradAttention"),
    "GradDrop": of_method("GradDrop"),
    "TrimmedMean": of_method("TrimmedMean", 1),
    "MoCo": of_method("MoCo"),
    "DBMTL": of_method("DBMTL"),
    "MConFIG": of_method("MConFIG"),
    "MoDo": Refused(lambda m: {"aggregator": gk.MoDo(), "second": m.losses()}, r"aggregator=MoDo\(", ROWS),
    "SDMGrad": Refused(lambda m: {"aggregator": gk.SDMGrad(), "second": m.losses()}, r"aggregator=SDMGrad\(", ROWS),
    "a hook on a weight of the trunk": Refused(lambda m: hooked(m, m.lower[0].weight), r"'lower\.0\.weight'", ROWS),
    "a hook on a bias of the trunk": Refused(lambda m: hooked(m, m.upper[0].bias), r"'upper\.0\.bias'", ROWS),
    "a group for each parameter": Refused(lambda m: {"groups": "parameter"}, "groups='parameter'", KEPT, ["backward"]),
    "a group for each module": Refused(lambda m: {"groups": "module"}, "groups='module'", KEPT, ["backward"]),
    "groups by name": Refused(lambda m: {"groups": lambda name: name[:5]}, "groups", KEPT, ["backward"]),
    "shared of a part": Refused(lambda m: {"shared": m.lower}, "shared", KEPT, ["backward"]),
    "shared with a head": Refused(
        lambda m: {"shared": [*m.lower.parameters(), *m.upper.parameters(), *m.heads[0].parameters()]},
        "shared",
        KEPT,
        ["backward"],
    ),
    "checkpointing": Refused(
        lambda m: {"losses": m.losses(lambda run, h: checkpoint(run, h, use_reentrant=False))}, "checkpointing", ROWS
    ),
    "tensors that are computed from what was saved": Refused(
        lambda m: {"losses": m.losses(halved)}, "what went into each layer", ROWS
    ),
}


@pytest.mark.parametrize(
    ("name", "finish"), [(name, finish) for name, case in REFUSED.items() for finish in case.finishes]
)
def test_it_says_why_and_what_to_write(name: str, finish: str) -> None:
    model, case = Model(), REFUSED[name]
    method = gk.GradVac()
    gk.backward(model.losses(), model, aggregator=method)  # it has state from here on
    arguments = {"losses": None, "aggregator": method, **case.arguments(model)}
    arguments["losses"] = arguments["losses"] or model.losses()
    states = [arguments[key] for key in ("aggregator", "suppression") if key in arguments]
    before = [copy.deepcopy(state.state_dict()) for state in states]
    grads = [(p.grad, p.grad.clone()) for p in model.parameters()]
    passes = list(model.passes)
    with pytest.raises(ValueError, match=case.named) as error:
        gk.backward(params=model, through="activations", finish=finish, **arguments)
    assert_says(str(error.value), "activations", case.instead)
    assert model.passes == passes
    for p, (g, numbers) in zip(model.parameters(), grads, strict=True):
        assert p.grad is g
        assert torch.equal(g, numbers)
    for state, kept in zip(states, before, strict=True):
        assert_equal_states(state.state_dict(), kept)
    gk.backward(params=model, **arguments)  # what the message says to write: the graphs are still there
    assert model.passes != passes


def assert_says(message: str, *parts: str) -> None:
    for part in parts:
        assert re.search(part, message), f"{part} is not in: {message}"


@pytest.mark.parametrize("finish", FINISHES)
def test_memory(finish: str) -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = gk.SurgeryOptimizer(optimizer, gk.PCGrad(), memory=True)
    with pytest.raises(ValueError, match="memory=True") as error:
        opt.backward(model.losses(), through="activations", finish=finish)
    assert_says(str(error.value), "activations", ROWS)
    assert model.passes == [0]
    assert all((p.grad == 7).all() for p in model.parameters())
    opt.backward(model.losses())


@pytest.mark.parametrize("finish", FINISHES)
def test_accumulation(finish: str) -> None:
    model = Model()
    opt = gk.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), gk.PCGrad())
    with opt.accumulate():
        with pytest.raises(ValueError, match=r"^accumulate\(\)") as error:
            opt.backward(model.losses(), through="activations", finish=finish)
        assert_says(str(error.value), "activations", ROWS)
        assert model.passes == [0]
        opt.backward(model.losses())
    assert model.passes != [0]


@pytest.mark.parametrize("finish", FINISHES)
@pytest.mark.parametrize("name", ["update", "backward"])
def test_an_optimizer_refuses_what_backward_refuses(name: str, finish: str) -> None:
    """The parameters, the optimizer's state and κ stay too."""
    model = Model()
    opt = gk.SurgeryOptimizer(gk.optim.AdamW(model.parameters(), lr=0.1), gk.GradDrop(seed=3))
    before = copy.deepcopy((model.state_dict(), opt.state_dict()))
    with pytest.raises(ValueError, match="GradDrop"):
        getattr(opt, name)(model.losses(), through="activations", finish=finish)
    assert_equal_states({"model": model.state_dict(), "opt": plain(opt.state_dict())}, _named(before))
    assert model.passes == [0]
    assert all((p.grad == 7).all() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregator": gk.GradAttention()}, "aggregator=GradAttention.* looks at entries"),
        ({"memory": True}, "memory=True, which keeps the task gradients: give through='rows'"),
        ({"groups": "parameter"}, "groups='parameter' and finish='backward'.*give finish='kept'"),
        ({"suppression": gk.Suppression(0.5, seed=0)}, "suppression=.*give finish='kept'"),
        ({"suppression": gk.Suppression(0.5, seed=0, scope="all"), "finish": "kept"}, "give scope='update'"),
        ({"through": "features", "groups": "parameter"}, "through='features' does not go together with groups"),
    ],
)
def test_a_constructor_refuses_what_no_step_can_do(options: dict[str, Any], message: str) -> None:
    given = {"aggregator": gk.PCGrad(), "through": "activations", **options}
    with pytest.raises(ValueError, match=message):
        gk.SurgeryOptimizer(torch.optim.SGD(Model().parameters(), lr=0.1), given.pop("aggregator"), **given)


def _named(before: tuple[Any, Any]) -> dict[str, Any]:
    return {"model": before[0], "opt": plain(before[1])}


def plain(state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state without its lists of options, which hold no tensors."""
    return {key: value for key, value in state.items() if key != "param_groups"}


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"through": "layers"}, ValueError, r"through must be .*got 'layers'"),
    ({"throgh": "rows"}, TypeError, r"throgh is no argument of this call|argument 'throgh'"),
    ({"through": None}, (TypeError, ValueError), r"through must be .*got None"),
    ({"through": "activations", "finish": "rows"}, ValueError, r"finish must be .*got 'rows'"),
    ({"finish": "kept"}, ValueError, r"finish='kept' needs through='activations', got through='rows'"),
    ({"through": "activations", "gramian": 64}, TypeError, r"gramian must be .*got 64"),
    ({"through": "activations", "per_example": True}, ValueError, r"per_example=True needs through='features'"),
    ({"gramian": gk.Sketch(8)}, ValueError, r"gramian=.* needs through='activations', got through='rows'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = Model()
    opt = gk.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), gk.PCGrad())
    with pytest.raises(error, match=message):
        gk.backward(model.losses(), model, aggregator=gk.PCGrad(), **arguments)
    with pytest.raises(error, match=message):
        gk.SurgeryOptimizer(opt.optimizer, gk.PCGrad(), **arguments)
    for step in (opt.backward, opt.update):
        with pytest.raises(error, match=message):
            step(model.losses(), **arguments)
    assert model.passes == [0]
    assert all((p.grad == 7).all() for p in model.parameters())
