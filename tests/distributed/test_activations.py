"""Steps through activations on several ranks, compared with rows of one process that has the whole batch."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import gradkern as gk
from tests.distributed.jobs import Run, T, mesh_of, whole
from tests.distributed.pool import Pool
from tests.distributed.test_equal import check
from tests.distributed.test_tasks import Experts, assert_near, data, part
from tests.distributed.test_words import WIDTH, Counted

FINISH = ["backward", "kept"]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("finish", FINISH)
@pytest.mark.parametrize("method", ["PCGrad", "MGDA", "UPGrad", "Uncertainty, report", "Sum, report"])
def test_it_is_that_of_one_process(pool: Pool, method: str, finish: str, ranks: int) -> None:
    check(pool, Run(method, finish=finish), ranks)


@pytest.mark.parametrize("finish", FINISH)
@pytest.mark.parametrize("kind", ["ddp", "update", "fused", "shard"])
def test_every_way_to_take_a_step(pool: Pool, kind: str, finish: str) -> None:
    kinds: dict[str, Any] = {kind: True, "update": kind in ("update", "shard")}
    check(pool, Run("MGDA", finish=finish, **kinds), 2)


@pytest.mark.parametrize(
    "options", ["parameter", "module", "shared", "suppression", "suppression in blocks", "conflict_lr"]
)
def test_groups_and_modifiers(pool: Pool, options: str) -> None:
    check(pool, Run("GradVac" if options == "parameter" else "PCGrad", finish="kept", options=options), 3)


def test_the_learning_rate_by_conflict(pool: Pool) -> None:
    check(pool, Run("PCGrad", finish="backward", options="conflict_lr"), 2)


@pytest.mark.parametrize("method", ["PCGrad", "MGDA", "UPGrad"])
@pytest.mark.parametrize("sharding", ["resharded", "kept", "gathered", "of root", "heads left out", "columns"])
def test_sharded_parameters(pool: Pool, sharding: str, method: str) -> None:
    check(pool, Run(method, finish="backward", sharding=sharding), 2)


def test_sharded_parameters_with_replicas(pool: Pool) -> None:
    check(pool, Run("MGDA", finish="backward", sharding="replicas"), 4)


def images() -> tuple[nn.Module, Tensor]:
    """Return a model of which each layer's backward pass reads a weight, with a result for each task, and a batch."""
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, groups=2), nn.Tanh(), nn.Flatten()]
    layers = [nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, T)]
    return nn.Sequential(*convolutions, *layers).double(), torch.randn(8, 2, 5, 5).double()


def of_images(rank: int, group: Any, ranks: int, policy: Any = None) -> list[Tensor]:
    """Return Gramian, weights and gradients of a step of the model, which one process takes by rows."""
    model, x = images()
    way: dict[str, Any] = {}
    if ranks > 1:
        fully_shard(model, mesh=mesh_of(group, ranks, ""), **({} if policy is None else {"mp_policy": policy}))
        way = {"through": "activations"}
    params = list(model.parameters())
    y = model(x[rank * 8 // ranks : (rank + 1) * 8 // ranks])
    losses = [(y - target).square().mean().double() for target in 3 * torch.eye(T)]
    info = gk.backward(losses, params, aggregator=gk.MGDA(), process_group=group, **way)
    assert info.gramian is not None
    assert info.weights is not None
    return [info.gramian, info.weights, *(whole(p.grad) for p in params if p.grad is not None)]


def test_weights_that_are_gathered_together(pool: Pool) -> None:
    """They are freed at the end of each pass."""
    expected = of_images(0, False, 1)
    for found in pool.run(of_images, 2, ranks=2):
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)  # float64 sums of hundreds of numbers


def test_weights_that_are_gathered_in_fewer_bits(pool: Pool) -> None:
    M, _, *grads = of_images(0, False, 1)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for found in pool.run(of_images, 2, policy, ranks=2):
        torch.testing.assert_close(found[0].double(), M, rtol=0.1, atol=0.05 * M.abs().max().item())  # eight bits
        assert len(found) == 2 + len(grads)


def lacking(
    rank: int, group: Any, ranks: int, finish: str, absent: Sequence[tuple[int, int]], shared_by: Sequence[int] = ()
) -> list[Any]:
    """Return the result of two steps in which ranks lack tasks, through activations; by rows in one process.

    Args:
        rank: this rank; one process does what all ranks do.
        group: the ranks; False for one process.
        ranks: the number of ranks.
        finish: how a step ends.
        absent: the pairs of a rank and a task that it lacks.
        shared_by: for each task, the number of the first layer that it goes through; none for models without one.
    """
    torch.manual_seed(0)
    model = Experts()
    params = list(model.parameters())
    way: dict[str, Any] = {} if group is False else {"through": "activations", "finish": finish}
    results = []
    for step in range(2):
        x, y = data(step)
        losses: list[Tensor | None] = []
        for t in range(T):
            having = [r for r in range(ranks) if (r, t) not in absent]
            here = having if group is False else [rank] if rank in having else []
            parts = [model.loss_by(shared_by[t] if shared_by else 0, t, *part(r, ranks, x, y)) for r in here]
            losses.append(sum(parts[1:], parts[0]) / (ranks if group is False else 1) if parts else None)
        for p in params:
            p.grad = None
        info = gk.backward(losses, params, aggregator=gk.MGDA(), process_group=group, **way)
        results.append(([p.grad for p in params], info.losses, info.gramian, info.weights))
        with torch.no_grad():
            for p in params:
                if p.grad is not None:
                    p -= 0.1 * p.grad
    return results


ABSENT = {
    "on all ranks": [(0, 1), (1, 1)],
    "on one rank": [(1, 1)],
    "another on each rank": [(0, 0), (1, 2)],
    "all but one on a rank": [(1, 0), (1, 1)],
    "all but one on each rank": [(0, 0), (0, 1), (1, 1), (1, 2)],
}
"""The pairs of a rank and a task that it lacks."""


@pytest.mark.parametrize("finish", FINISH)
@pytest.mark.parametrize("name", ABSENT)
def test_absent_tasks(pool: Pool, name: str, finish: str) -> None:
    """What two tasks share on any ranks is under surgery on all of them."""
    expected = lacking(0, False, 2, finish, ABSENT[name])
    for results in pool.run(lacking, 2, finish, ABSENT[name], ranks=2):
        assert_near(results, expected)


@pytest.mark.parametrize("finish", FINISH)
def test_a_parameter_of_one_task_on_some_ranks(pool: Pool, finish: str) -> None:
    """Task 2 alone goes through the second of the first layers; rank 0 lacks task 0."""
    expected = lacking(0, False, 3, finish, [(0, 0)], [0, 0, 1])
    for results in pool.run(lacking, 3, finish, [(0, 0)], [0, 0, 1], ranks=3):
        assert_near(results, expected)


def sent(rank: int, group: Any, finish: str, columns: int | None) -> tuple[int, int]:
    """Return the float32 words that a step sends, and the number of all parameters."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    h = trunk(torch.randn(4, WIDTH))
    losses = [(h * (t + 1)).square().mean() for t in range(T)]
    sketch = None if columns is None else gk.Sketch(columns, 0)
    way: dict[str, Any] = {"through": "activations", "finish": finish, "gramian": sketch}
    with Counted() as counted:
        gk.backward(losses, trunk, aggregator=gk.PCGrad(), process_group=group, **way)
    return counted.words(), sum(p.numel() for p in trunk.parameters())


@pytest.mark.parametrize("finish", FINISH)
def test_the_words_sent(pool: Pool, finish: str) -> None:
    """Exactly T + 2 for each parameter; a sketch sends ``columns`` for each row of a weight, and biases as they are."""
    for words_sent, P in pool.run(sent, finish, None, ranks=4):
        assert words_sent == (T + 2) * P
    for words_sent, P in pool.run(sent, finish, 8, ranks=4):
        assert words_sent == T * 2 * (WIDTH * 8 + WIDTH) + 2 * P
