"""Surgery on the gradients by the features on several ranks, compared with one process that has the whole batch."""

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gradkern as gk
from tests.distributed.jobs import METHODS, T
from tests.distributed.pool import Pool
from tests.distributed.test_faults import forget
from tests.distributed.test_tasks import BATCH, assert_near, data
from tests.models import MultiHead

Lacking = dict[int, set[tuple[int, int]]]
"""By step, pairs of a rank and a task."""
NONE: Lacking = {}
each_sum = pytest.mark.parametrize("per_example", [False, True])


class TwoTrunks(MultiHead):
    """A model with another trunk, whose output most losses take too."""

    def __init__(self) -> None:
        super().__init__(T)
        self.other = nn.Linear(6, 5)
        self.double()

    def forward(
        self, x: Tensor, y: Tensor, ranks: Sequence[int], narrow: set[tuple[int, int]]
    ) -> tuple[list[list[Tensor]], list[Tensor]]:
        """Return the losses of each rank's examples, and the features.

        Args:
            x: the examples of some ranks.
            y: their targets.
            ranks: these ranks.
            narrow: the pairs of a rank and a task whose loss takes the first trunk's output alone.
        """
        h, g = self.trunk(x), self.other(x)
        parts = zip(h.chunk(len(ranks)), g.chunk(len(ranks)), y.chunk(len(ranks), 1), strict=True)
        losses = [
            [
                (self.heads[t](h_r).squeeze(-1) - y_r[t]).square().mean()
                + (0 if (r, t) in narrow else (g_r.mean(1) - y_r[t]).square().mean())
                for t in range(T)
            ]
            for r, (h_r, g_r, y_r) in zip(ranks, parts, strict=True)
        ]
        return losses, [h, g]


def steps(
    rank: int,
    group: Any,
    name: str,
    ranks: int,
    per_example: bool,
    absent: Lacking = NONE,
    narrow: Lacking = NONE,
    ddp: bool = False,
    update: bool = False,
    shard: bool = False,
) -> list[Any]:
    """Return the gradients or parameters of two steps, the losses, weights, Gramian, step scale and norm.

    Args:
        rank: this rank; one process does what all ranks do.
        group: the ranks; False for one process.
        name: the method's.
        ranks: the number of ranks.
        per_example: as for ``gradkern.backward``.
        absent: the tasks that a rank lacks.
        narrow: the tasks whose loss on a rank takes nothing of the other trunk.
        ddp: whether the model is in DistributedDataParallel.
        update: whether a step is ``update(max_norm=1)`` of AdamW.
        shard: whether each rank has the state of some rows alone.
    """
    torch.manual_seed(0)
    model, method, alone = TwoTrunks(), METHODS[name](), group is False
    params = [*model.parameters(), *method.parameters()]
    inner = gk.optim.AdamW(params, lr=0.1) if update else torch.optim.SGD(params, lr=0.1)
    way: dict[str, Any] = {"through": "features", "per_example": per_example}
    way |= {"process_group": group, "shard_optimizer": shard and not alone}
    opt = gk.SurgeryOptimizer(inner, method, conflict_lr=None if "Sum" in name else gk.ConflictLR(), **way)
    forward = DistributedDataParallel(model, process_group=group) if ddp and not alone else model
    torch.manual_seed(5 if rank == 0 else 100 + rank)  # the numbers drawn are those of rank 0
    results = []
    for step in range(2):
        x, y = data(step)
        here = list(range(ranks)) if alone else [rank]
        own = slice(0, BATCH) if alone else slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
        of_ranks, features = forward(x[own], y[:, own], here, narrow.get(step, set()))
        losses: list[Tensor | None] = []
        for t in range(T):
            terms = [of_ranks[k][t] for k, r in enumerate(here) if (r, t) not in absent.get(step, ())]
            losses.append(sum(terms[1:], terms[0]) / len(here) if terms else None)
        if update:
            info = opt.update(losses, features=features, max_norm=1.0)
            numbers: list[Tensor | None] = [p.detach().clone() for p in params]
        else:
            info = opt.backward(losses, features=features)
            numbers = [None if p.grad is None else p.grad.clone() for p in params]
            opt.step()
            opt.zero_grad()
        results.append((numbers, info.losses, info.weights, info.gramian, info.step_scale, info.total_norm))
    return results


def check(pool: Pool, ranks: int, name: str, per_example: bool, **kinds: Any) -> None:
    expected = steps(0, False, name, ranks, per_example, **kinds)
    found = pool.run(_named, name, ranks, per_example, kinds, ranks=ranks)
    for results in found:
        assert_near(results, expected)
        for (numbers, *others), (first, *first_others) in zip(results, found[0], strict=True):
            for a, b in zip([*numbers, *others], [*first, *first_others], strict=True):
                assert a is b or torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0))  # a loss may be NaN


def _named(rank: int, group: Any, name: str, ranks: int, per_example: bool, kinds: dict[str, Any]) -> list[Any]:
    return steps(rank, group, name, ranks, per_example, **kinds)


@each_sum
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("name", ["PCGrad", "GradVac", "MGDA", "UPGrad", "Smoothed PCGrad"])
def test_methods_are_those_of_one_process(pool: Pool, name: str, ranks: int, per_example: bool) -> None:
    check(pool, ranks, name, per_example)


@each_sum
@pytest.mark.parametrize("name", ["Sum", "Sum, report", "Uncertainty", "Uncertainty, report"])
def test_weightings_are_those_of_one_process(pool: Pool, name: str, per_example: bool) -> None:
    check(pool, 2, name, per_example)


@each_sum
@pytest.mark.parametrize("kind", ["ddp", "update", "shard"])
def test_every_way_to_take_a_step(pool: Pool, kind: str, per_example: bool) -> None:
    check(pool, 2, "PCGrad", per_example, **({"update": True, "shard": True} if kind == "shard" else {kind: True}))


ABSENT: dict[str, Lacking] = {
    "on all ranks": {1: {(0, 1), (1, 1)}},
    "on one rank": {0: {(1, 1)}, 1: {(0, 0), (1, 2)}},
    "all tasks of one rank but one": {0: {(1, 0), (1, 1)}},
}


@each_sum
@pytest.mark.parametrize("absent", ABSENT)
@pytest.mark.parametrize("name", ["PCGrad", "MGDA"])
def test_a_task_that_ranks_lack_counts_there_with_zero(pool: Pool, name: str, absent: str, per_example: bool) -> None:
    check(pool, 2, name, per_example, absent=ABSENT[absent])


@each_sum
def test_tasks_may_reach_other_features_on_each_rank(pool: Pool, per_example: bool) -> None:
    narrow: Lacking = {0: {(0, 0), (0, 1), (0, 2)}, 1: {(0, 0), (1, 0), (1, 2)}}
    check(pool, 2, "UPGrad", per_example, narrow=narrow)


def refused(rank: int, group: Any, fault: str) -> tuple[str, str, bool]:
    """Return the error of a step that is not the same on all ranks, and whether nothing has changed."""
    forget(group)
    torch.manual_seed(0)
    model, long = TwoTrunks(), nn.Linear(6, 4).double()
    x, y = data(0)
    x, y = x[:6], y[:, :6]
    way: dict[str, Any] = {"through": "features"}
    sequence = long(x.view(1, 6, 6)[:, : 6 - rank] if "length" in fault else x.view(2, 3, 6))
    features = [model.trunk(x), sequence]
    losses = [(head(features[0]).square().mean() + sequence.mean() ** 2) for head in model.heads]
    if fault == "way of one" and rank == 1:
        way["per_example"] = True
    if fault == "length, per example":
        way["per_example"] = True
    if fault == "no feature of one" and rank == 1:
        features = [features[0].detach()]
    if fault == "hook of one" and rank == 1:
        model.trunk[0].weight.register_hook(lambda g: 1 // 0)
    if fault == "method of all":
        way["groups"] = "parameter"
    if fault == "sparse":
        table = nn.Embedding(5, 4, sparse=True).double()
        features.append(table(torch.arange(5)))
        losses[0] = losses[0] + features[-1].sum()
        long = nn.ModuleList([long, table])
    params = [*model.parameters(), *long.parameters()]
    try:
        gk.backward(losses, params, aggregator=gk.PCGrad(order=range(T)), features=features, process_group=group, **way)
    except Exception as error:
        return type(error).__name__, str(error), all(p.grad is None for p in params)
    return "", "", False


FAULTS = {
    "way of one": (["ValueError"] * 2, "through, finish, gramian or per_example: those of rank 1 are not those"),
    "length": (["ValueError"] * 2, "shapes after dimension 0.* With per_example=True the shapes may differ"),
    "no feature of one": (["RuntimeError", "ValueError"], "features reach no parameter that is trained"),
    "hook of one": (["RuntimeError", "ZeroDivisionError"], "by zero"),
    "method of all": (["ValueError"] * 2, "have one Gramian"),
    "sparse": (["NotImplementedError"] * 2, "sparse gradient"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_all_ranks_raise_and_nothing_changes(pool: Pool, fault: str) -> None:
    kinds, message = FAULTS[fault]
    for kind, (found, text, untouched) in zip(kinds, pool.run(refused, fault, ranks=2), strict=True):
        assert found == kind, text
        assert re.search(message, text), text
        assert untouched


def test_sequences_of_several_lengths_per_example(pool: Pool) -> None:
    assert [found for found, _, _ in pool.run(refused, "length, per example", ranks=2)] == ["", ""]
