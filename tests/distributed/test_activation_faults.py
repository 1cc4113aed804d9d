"""Faults in steps through activations: all ranks raise, nothing hangs or has changed, and the next step works."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

import gradkern as gk
from tests.distributed.jobs import SHARDINGS, Net, T, mesh_of
from tests.distributed.pool import Pool
from tests.distributed.sentences import COLUMNS, PLAIN, words
from tests.distributed.test_faults import forget

FINISH = ["backward", "kept"]


class Raising(torch.autograd.Function):
    """Passes on its input, and its gradient, but for the call with a number, which raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, calls: list[int]) -> Tensor:
        """Keep how many calls of backward are left."""
        ctx.calls = calls
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        """Raise if no call is left."""
        ctx.calls[0] -= 1
        if ctx.calls[0] < 0:
            raise KeyError("the layer of rank 1")
        return g, None


class Step:
    """A step of one rank, which a fault changes before it is taken."""

    def __init__(self, rank: int, finish: str) -> None:
        self.rank = rank
        self.model, self.ids, self.y = words(rank, 2)
        self.method = gk.GradVac()
        self.sketch: gk.Sketch | None = gk.Sketch(COLUMNS, 3)
        self.finish = finish
        self.at = list(PLAIN)
        self.patch = pytest.MonkeyPatch()

    def take(self, group: Any) -> gk.SurgeryInfo:
        """Take the step."""
        way: dict[str, Any] = {"through": "activations", "finish": self.finish, "gramian": self.sketch}
        losses = self.model.losses(self.ids, self.y, self.at)
        return gk.backward(losses, self.model, aggregator=self.method, process_group=group, **way)

    def raise_at(self, place: int, calls: int) -> None:
        """Let rank 1 raise in a backward pass, after some that do not."""
        if self.rank == 1:
            left = [calls]
            self.at[place] = lambda x: Raising.apply(x, left)


def the_last_layer_raises(step: Step) -> None:
    step.raise_at(2, 0)


def a_layer_raises_for_the_second_task(step: Step) -> None:
    step.raise_at(1, 1)


def the_first_layer_raises(step: Step) -> None:
    step.raise_at(0, 0)


def the_first_layer_raises_in_the_last_pass(step: Step) -> None:
    step.raise_at(0, T)


def a_sum_of_dot_products_raises(step: Step) -> None:
    def raising(*_: Any) -> Tensor:
        raise KeyError("no memory")

    if step.rank == 1:
        step.patch.setattr("gradkern.step.mean_gramians.sketched_rows", raising)


def a_combination_raises(step: Step) -> None:
    def raising(*_: Any) -> Tensor:
        raise KeyError("no memory")

    if step.rank == 1:
        step.patch.setattr("gradkern.step.activation_rows.weighted_grad", raising)


def a_layer_is_used_in_another_way(step: Step) -> None:
    if step.rank == 1:
        step.at[2] = lambda h: h + step.model.layer.weight.sum(1)


def a_layer_is_detached(step: Step) -> None:
    if step.rank == 1:
        step.at[0] = torch.detach


def another_seed(step: Step) -> None:
    step.sketch = gk.Sketch(COLUMNS, step.rank)


def a_step_more(step: Step) -> None:
    assert step.sketch is not None
    if step.rank == 1:
        step.sketch.advance()


def no_sketch(step: Step) -> None:
    if step.rank == 1:
        step.sketch = None


def another_finish(step: Step) -> None:
    if step.rank == 1:
        step.finish = "kept" if step.finish == "backward" else "backward"


RAISED = r"KeyError: .*the layer of rank 1|RuntimeError: .* because rank 1 raised KeyError: .*the layer of rank 1"
NO_MEMORY = r"KeyError: 'no memory'|RuntimeError: .* because rank 1 raised KeyError: 'no memory'"
OTHER_WAY = "ValueError: .*through, finish, gramian or per_example"
FAULTS: dict[Callable[[Step], None], str] = {
    the_last_layer_raises: RAISED,
    a_layer_raises_for_the_second_task: RAISED,
    the_first_layer_raises: RAISED,
    a_sum_of_dot_products_raises: NO_MEMORY,
    a_layer_is_used_in_another_way: "ValueError: .*which params several losses reach, or the layers that use them",
    a_layer_is_detached: "ValueError: .*which params several losses reach, or the layers that use them",
    another_seed: OTHER_WAY,
    a_step_more: OTHER_WAY,
    no_sketch: OTHER_WAY,
    another_finish: OTHER_WAY,
}
"""Faults, and what all ranks raise."""


class Raised(NamedTuple):
    """What a step has raised, whether all is as before, and the Gramian of the step after."""

    text: str
    untouched: bool
    gramian: Tensor | None


def with_fault(rank: int, group: Any, name: str, finish: str) -> Raised:
    """Take a step with a fault, if it has a name, and then a right one, with a new group of the same ranks."""
    forget(group)
    step, text, untouched = Step(rank, finish), "", True
    for p in step.model.parameters():
        p.grad = torch.ones_like(p)
    if name:
        globals()[name](step)
        sketch, before = step.sketch, [step.method.state_dict(), step.sketch and step.sketch.state_dict()]
        try:
            step.take(group)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        after = [step.method.state_dict(), sketch and sketch.state_dict()]
        grads = [p.grad for p in step.model.parameters() if p.grad is not None]
        untouched = str(before) == str(after) and all(bool((g == 1).all()) for g in grads)
        step.patch.undo()
        right = Step(rank, finish)
        right.model = step.model
        step = right
    return Raised(text, untouched, step.take(group).gramian)


@pytest.mark.parametrize("finish", FINISH)
def test_all_ranks_raise_and_the_next_step_works(pool: Pool, finish: str) -> None:
    right = pool.run(with_fault, "", finish, ranks=2)[0].gramian
    last = the_first_layer_raises_in_the_last_pass if finish == "backward" else a_combination_raises
    for fault, text in {**FAULTS, last: RAISED if finish == "backward" else NO_MEMORY}.items():
        for raised in pool.run(with_fault, fault.__name__, finish, ranks=2):
            assert re.match(text, raised.text, re.DOTALL), (fault.__name__, raised.text)
            assert raised.untouched, fault.__name__
            assert torch.equal(raised.gramian, right), fault.__name__


def looking_for_unused(rank: int, group: Any, finish: str) -> str:
    """Take a step with a model whose wrapper makes all losses by one node; return the error."""
    torch.manual_seed(0)
    model = Net(T).double()
    forward = DistributedDataParallel(model, process_group=group, find_unused_parameters=True)
    *losses, _ = forward(torch.randn(8, 6).double(), torch.randn(T, 8).double())
    way: dict[str, Any] = {"through": "activations", "finish": finish}
    with pytest.raises((ValueError, RuntimeError)) as raised:
        gk.backward(losses, list(model.parameters()), aggregator=gk.PCGrad(), process_group=group, **way)
    assert all(p.grad is None for p in model.parameters())
    return str(raised.value)


@pytest.mark.parametrize("finish", FINISH)
def test_one_node_of_all_losses_is_refused(pool: Pool, finish: str) -> None:
    """It would put the heads under surgery, which have a gradient of one task each."""
    for text in pool.run(looking_for_unused, finish, ranks=2):
        assert "find_unused_parameters=False" in text


def one_raises(rank: int, group: Any) -> tuple[str, bool]:
    """Take a step in which rank 1 raises in the second task's pass; return the error, and whether it wrote nothing."""
    model, *batch = words(rank, 2)
    fully_shard(model, mesh=mesh_of(group, 2, ""))
    register_fsdp_forward_method(model, "losses")
    params, left = list(model.parameters()), [1 if rank == 1 else 100]
    losses = model.losses(*batch, [torch.clone, lambda x: Raising.apply(x, left), torch.clone])
    try:
        gk.backward(losses, params, aggregator=gk.PCGrad(), process_group=group, through="activations")
    except Exception as error:
        return f"{type(error).__name__}: {error}", all(p.grad is None for p in params)
    return "", False


def test_a_rank_that_raises_where_weights_are_gathered_does_so_at_once(tmp_path: Path) -> None:
    """The others raise by the timeout of the process group."""
    pool = Pool(2, tmp_path, timeout=4)
    try:
        (other, *other_is_right), (own, *own_is_right) = pool.run(one_raises, ranks=2, seconds=40)
    finally:
        pool.close()
    assert own == "KeyError: 'the layer of rank 1'"
    assert other.startswith(("RuntimeError", "DistBackendError"))
    assert (other_is_right, own_is_right) == ([True], [True])


def refused(rank: int, group: Any, sharding: str, finish: str) -> str:
    """Take a step through activations that is refused, and then one through rows; return the error."""
    torch.manual_seed(0)
    model = Net(T, 12).double()
    SHARDINGS[sharding](model, mesh_of(group, 4, sharding))
    params = list(model.named_parameters())
    *losses, _ = model(torch.ones(8, 6).double(), torch.ones(T, 8).double())
    step: dict[str, Any] = {"aggregator": gk.PCGrad(), "process_group": group}
    with pytest.raises(NotImplementedError) as raised:
        gk.backward(losses, params, through="activations", finish=finish, **step)
    assert all(p.grad is None for _, p in params)
    gk.backward(losses, params, **step)
    return str(raised.value)


@pytest.mark.parametrize(
    ("sharding", "finish", "text"),
    [
        ("resharded", "kept", "finish='kept' is not for DTensors in params yet: give through='rows'"),
        ("tensor parallel", "backward", "'trunk.0.weight' of shape .* is another one: give through='rows'"),
        ("tensor parallel shards", "backward", "'trunk.0.weight' of shape .* is another one: give through='rows'"),
    ],
)
def test_other_sharded_parameters_are_refused(pool: Pool, sharding: str, finish: str, text: str) -> None:
    for raised in pool.run(refused, sharding, finish, ranks=4):
        assert re.search(text, raised), raised
