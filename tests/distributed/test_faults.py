"""Ranks that cannot take a step, or take different ones: all raise, nothing hangs, and nothing has changed."""

import gc
import os
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gradkern as gk
from gradkern.compat import pcgrad
from gradkern.distributed import comm
from tests.distributed.jobs import Net
from tests.distributed.pool import Pool

T = 3


class Raised(NamedTuple):
    """What a step has raised on a rank, and whether every ``.grad`` and the method's state are as before."""

    kind: str
    text: str
    untouched: bool


class Step:
    """A step of one rank, which a fault changes before it is taken."""

    def __init__(self, rank: int) -> None:
        torch.manual_seed(0)
        self.rank = rank
        self.model = Net(T)
        self.method: gk.Aggregator = gk.GradVac()
        self.options: dict[str, Any] = {}
        torch.manual_seed(rank)
        self.x, self.y = torch.randn(8, 6), torch.randn(T, 8)
        self.losses: list[Any] = [lambda t=t: self.model.loss(t, self.x, self.y) for t in range(T)]
        self.params: Any = self.model

    def take(self, group: Any) -> gk.SurgeryInfo:
        """Take the step."""
        return gk.backward(self.losses, self.params, aggregator=self.method, process_group=group, **self.options)


def fault(name: str) -> Callable[[Step], None]:
    """Return a fault by the name of its function."""
    return globals()[name]


def forget(group: Any) -> None:
    """Let the ranks begin anew: some of them may have begun more steps than others."""
    comm._comms.pop(group, None)


def same(g: Tensor | None, h: Tensor | None) -> bool:
    """Return whether two gradients have the same numbers, or both are missing."""
    return g is h if g is None or h is None else torch.equal(g, h)


def two_steps(rank: int, group: Any, name: str, right_before: bool) -> Raised | None:
    """Take a step with a fault in a new group of the same ranks, and perhaps a right one before."""
    forget(group)
    step = Step(rank)
    if right_before:
        step.take(group)
    params = list(step.model.parameters())
    grads = [None if p.grad is None else p.grad.clone() for p in params]
    fault(name)(step)
    state = {key: x.clone() for key, x in step.method.state_dict().items() if isinstance(x, Tensor)}
    try:
        step.take(group)
    except Exception as error:
        untouched = all(same(g, p.grad) for g, p in zip(grads, params, strict=True))
        now = step.method.state_dict()
        untouched = untouched and all(torch.equal(x, now[key]) for key, x in state.items())
        return Raised(type(error).__name__, str(error), untouched)
    return None


def one_loss_raises(step: Step) -> None:
    def raising() -> Tensor:
        raise KeyError("the batch of rank 1")

    if step.rank == 1:
        step.losses[1] = raising


def one_loss_of_whole_rows_raises(step: Step) -> None:
    step.method = gk.MoCo()
    one_loss_raises(step)


def one_loss_of_a_weighted_sum_raises(step: Step) -> None:
    step.method = gk.GeometricMean()
    one_loss_raises(step)


def one_loss_of_the_second_batch_raises(step: Step) -> None:
    losses = list(step.losses)
    one_loss_raises(step)
    step.method, step.options["second"], step.losses = gk.MoDo(), step.losses, losses


def one_loss_is_detached(step: Step) -> None:
    if step.rank == 1:
        step.losses[2] = torch.ones(())


def one_has_a_task_less(step: Step) -> None:
    if step.rank == 1:
        step.losses.pop()


def one_has_fewer_params(step: Step) -> None:
    if step.rank == 1:
        step.params = list(step.model.parameters())[:-1]


def one_has_another_order(step: Step) -> None:
    if step.rank == 1:
        step.params = list(step.model.parameters())[::-1]


def one_has_a_wider_layer(step: Step) -> None:
    if step.rank == 1:
        step.model.trunk = nn.Sequential(nn.Linear(6, 11), nn.Tanh(), nn.Linear(11, 8))


def one_has_frozen_a_layer(step: Step) -> None:
    if step.rank == 1:
        step.model.trunk[0].requires_grad_(False)


def one_has_frozen_another_head(step: Step) -> None:
    step.model.heads[step.rank].requires_grad_(False)


def one_has_two_params_of_one_shape_in_another_order(step: Step) -> None:
    params = list(step.model.parameters())
    if step.rank == 1:
        params[4], params[6] = params[6], params[4]
    step.params = params


def one_has_another_new_param(step: Step) -> None:
    torch.manual_seed(step.rank)
    new = nn.Parameter(torch.randn(()))
    step.params = [*step.model.parameters(), new]
    step.losses[0] = lambda: new * step.model.loss(0, step.x, step.y)


def one_has_a_method_of_another_seed(step: Step) -> None:
    torch.manual_seed(step.rank)
    step.method = gk.GradAttention(subset=50)


def one_has_tensors_in_place_of_callables(step: Step) -> None:
    step.method = gk.DWA()
    if step.rank == 1:
        step.losses = [loss() for loss in step.losses]


def one_has_other_values(step: Step) -> None:
    if step.rank == 1:
        with torch.no_grad():
            step.model.trunk[0].weight[0, 0] += 1


def one_has_another_method(step: Step) -> None:
    if step.rank == 1:
        step.method = gk.GradVac(beta=0.5)


def one_has_another_seed(step: Step) -> None:
    step.options["suppression"] = gk.Suppression(0.3, seed=step.rank)


def one_has_other_groups(step: Step) -> None:
    step.options["groups"] = "module" if step.rank == 1 else "model"


def one_has_a_sparse_gradient(step: Step) -> None:
    table = nn.Embedding(4, 8, sparse=True)
    with torch.no_grad():
        table.weight.fill_(1)
    step.params = [*step.model.parameters(), table.weight]
    at = torch.arange(4)
    step.losses[0] = lambda: step.model.loss(0, step.x, step.y) + table(at).square().sum()


def one_switches_requires_grad(step: Step) -> None:
    def switching() -> Tensor:
        step.model.trunk[0].requires_grad_(False)
        return step.model.loss(0, step.x, step.y)

    if step.rank == 1:
        step.losses[0] = switching


def a_block_is_too_large(step: Step) -> None:
    step.options["suppression"] = gk.Suppression(0.3, block=8192, seed=0)


SAME = {
    "one_has_a_task_less": r"ValueError: .*the number of losses: rank 0 has 3, rank 1 has 2",
    "one_has_fewer_params": r"ValueError: .*the number of params that require grad: rank 0 has 10, rank 1 has 9",
    "one_has_another_order": r"ValueError: .*the shapes, strides or dtypes of params, or their order",
    "one_has_a_wider_layer": r"ValueError: .*the number of elements in params: rank 0 has 185, rank 1 has 200",
    "one_has_frozen_a_layer": r"ValueError: .*the number of params that require grad: rank 0 has 10, rank 1 has 8",
    "one_has_frozen_another_head": r"ValueError: .*which of params require grad: those of rank 1",
    "one_has_two_params_of_one_shape_in_another_order": r"ValueError: .*(the values of params|in this order)",
    "one_has_another_new_param": r"ValueError: .*the values of params: those of rank 1",
    "one_has_a_method_of_another_seed": r"ValueError: .*the parameters or the state of the method: those of rank 1",
    "one_has_tensors_in_place_of_callables": r"ValueError: .*whether losses are callables",
    "one_has_another_method": r"ValueError: .*the method or its modifiers: those of rank 1",
    "one_has_another_seed": r"ValueError: .*the method or its modifiers: .*seed=",
    "one_has_other_groups": r"ValueError: .*the groups of params",
    "one_has_a_sparse_gradient": r"NotImplementedError: losses\[0\] has a sparse gradient .*sparse=False",
    "a_block_is_too_large": r"NotImplementedError: on several ranks there is no Suppression with a block above",
}
"""Faults of which all ranks tell the same, in a first step or in a later one."""
OTHERS = {
    "one_loss_raises": (r"KeyError: 'the batch of rank 1'", r"RuntimeError: .* because rank 1 raised KeyError"),
    "one_loss_of_whole_rows_raises": (r"KeyError: 'the batch", r"RuntimeError: .* because rank 1 raised KeyError"),
    "one_loss_of_a_weighted_sum_raises": (r"KeyError: 'the batch", r"RuntimeError: .* because rank 1 raised KeyError"),
    "one_loss_of_the_second_batch_raises": (
        r"KeyError: 'the batch",
        r"RuntimeError: .* because rank 1 raised KeyError",
    ),
    "one_loss_is_detached": (
        r"ValueError: losses\[2\] reaches no",
        r"RuntimeError: .* rank 1 raised ValueError: losses\[2\]",
    ),
    "one_switches_requires_grad": (
        r"NotImplementedError: a callable",
        r"RuntimeError: .* rank 1 raised NotImplemented",
    ),
}
"""Faults of rank 1, which tells what it is, and what the others tell."""


@pytest.mark.parametrize("right_before", [False, True], ids=["first step", "later step"])
@pytest.mark.parametrize("name", SAME)
def test_all_ranks_raise_the_same(pool: Pool, name: str, right_before: bool) -> None:
    for raised in pool.run(two_steps, name, right_before, ranks=2):
        assert raised is not None
        assert re.match(SAME[name], f"{raised.kind}: {raised.text}"), raised
        assert raised.untouched


@pytest.mark.parametrize("right_before", [False, True], ids=["first step", "later step"])
@pytest.mark.parametrize("name", OTHERS)
def test_one_rank_raises_and_tells_the_others(pool: Pool, name: str, right_before: bool) -> None:
    for rank, raised in enumerate(pool.run(two_steps, name, right_before, ranks=3)):
        assert raised is not None
        assert re.match(OTHERS[name][rank != 1], f"{raised.kind}: {raised.text}"), raised
        assert raised.untouched


def test_values_that_differ_are_found_in_the_first_step(pool: Pool) -> None:
    for raised in pool.run(two_steps, "one_has_other_values", False, ranks=2):
        assert raised is not None
        assert "the values of params: those of rank 1" in raised.text
        assert raised.untouched


def a_step_left_out(rank: int, group: Any) -> str:
    forget(group)
    step = Step(rank)
    for _ in range(2):
        step.take(group)
    found = comm.comm_of(group)
    assert found is not None
    found.steps += rank  # as if this rank had taken part in one more
    with pytest.raises(ValueError, match="the number of steps so far") as raised:
        step.take(group)
    forget(group)
    return str(raised.value)


def test_a_step_that_one_rank_has_left_out_is_found(pool: Pool) -> None:
    texts = pool.run(a_step_left_out, ranks=2)
    assert texts[0] == texts[1]
    assert "rank 0 has 3, rank 1 has 4" in texts[0]


REFUSED: dict[str, tuple[str, Callable[[nn.Module], gk.SurgeryOptimizer]]] = {
    "compat": ("compat=", lambda m: pcgrad.PCGrad(sgd(m), compat="original")),
}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer of a model."""
    return torch.optim.SGD(model.parameters(), lr=0.1)


def unsupported(rank: int, group: Any, name: str) -> None:
    message, make = REFUSED[name]
    step = Step(rank)
    opt = make(step.model)
    opt.process_group = group
    losses = [loss() for loss in step.losses]
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        opt.backward(losses)
    assert all(p.grad is None for p in step.model.parameters())


@pytest.mark.parametrize("name", REFUSED)
def test_what_several_ranks_lack_is_refused_by_name(pool: Pool, name: str) -> None:
    pool.run(unsupported, name, ranks=2)


def group_left(rank: int, group: Any) -> bool:
    own = torch.distributed.new_group([0, 1])
    Step(rank).take(own)
    held = weakref.ref(own)
    torch.distributed.destroy_process_group(own)
    del own
    gc.collect()
    return held() is None


def test_a_group_that_is_destroyed_is_not_held(pool: Pool) -> None:
    """Its threads end with it, and not while the process does."""
    assert pool.run(group_left, ranks=2) == [True, True]


def with_static_graph(rank: int, group: Any, callables: bool) -> str:
    step = Step(rank)
    model = DistributedDataParallel(step.model, process_group=group, static_graph=True)
    step.losses = [lambda t=t: model(step.x, step.y)[t] for t in range(T)]
    if not callables:
        step.losses = [loss() for loss in step.losses]
    with pytest.raises(
        (ValueError, RuntimeError), match=r"static_graph=True.*make it with static_graph=False"
    ) as raised:
        step.take(group)
    assert all(p.grad is None for p in step.model.parameters())
    return str(raised.value)


@pytest.mark.parametrize("callables", [False, True])
def test_a_static_graph_is_refused(pool: Pool, callables: bool) -> None:
    pool.run(with_static_graph, callables, ranks=2)


def one_dies(rank: int, group: Any, dies: bool) -> Raised:
    step = Step(rank)
    step.take(group)
    grads = [p.grad.clone() for p in step.model.parameters() if p.grad is not None]
    before = {key: x.clone() for key, x in step.method.state_dict().items() if isinstance(x, Tensor)}

    def ending() -> Tensor:
        if dies:
            os._exit(3)
        raise KeyboardInterrupt

    if rank == 1:
        step.losses[1] = ending
    try:
        step.take(group)
    except KeyboardInterrupt:
        return Raised("", "", True)
    except Exception as error:
        now = step.method.state_dict()
        untouched = all(torch.equal(g, p.grad) for g, p in zip(grads, step.model.parameters(), strict=True))
        untouched = untouched and all(torch.equal(x, now[key]) for key, x in before.items())
        return Raised(type(error).__name__, str(error), untouched)
    raise AssertionError("it took the step")


@pytest.mark.parametrize("dies", [True, False], ids=["ends", "leaves"])
def test_a_rank_that_is_gone(tmp_path: Path, dies: bool) -> None:
    """One whose process ends, and one that leaves the step by an exception that is not an error."""
    own = Pool(2, tmp_path, timeout=4)
    try:
        (_, raised), _ = own.run_with_errors(one_dies, dies, ranks=2, seconds=30)
        assert isinstance(raised, Raised), raised
        assert raised.untouched
        assert raised.kind in ("RuntimeError", "DistBackendError")
    finally:
        own.close()
