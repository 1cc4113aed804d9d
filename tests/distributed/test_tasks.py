"""Tasks that some ranks lack, or that reach other parameters on other ranks, compared with one process."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradkern as gk
from tests.distributed.jobs import Net, mesh_of, sharded, whole
from tests.distributed.pool import Pool
from tests.models import MultiHead

T = 3
BATCH = 12
TOLERANCE = 1e-12
"""Of float64 sums over examples and ranks in another order, a few roundings of numbers around 1."""
Grads = list[Tensor | None]

METHODS = {
    "GradDrop": lambda: gk.GradDrop(seed=7),
    "Sum": gk.Sum,
    "DWA": gk.DWA,
    "Uncertainty": lambda: gk.Uncertainty(T),
    "PCGrad": lambda: gk.PCGrad(order=[2, 0, 1]),
    "GradVac": lambda: gk.GradVac(order=[2, 0, 1]),
    "MGDA": gk.MGDA,
    "MoCo": gk.MoCo,
}


class Experts(MultiHead):
    """A model with a layer before its trunk, of which there are two."""

    def __init__(self) -> None:
        super().__init__(T)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.double()

    def loss_by(self, expert: int, t: int, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of task t through one of the first layers."""
        return self.loss(t, self.experts[expert](x), y)


def data(step: int) -> tuple[Tensor, Tensor]:
    """Return the batch of a step."""
    draw = torch.Generator().manual_seed(step)
    x, y = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((BATCH, 6), (T, BATCH)))
    return x, 3 * y


def part(rank: int, ranks: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return a rank's part of a batch."""
    own = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    return x[own], y[:, own]


def absent_ones(
    rank: int,
    group: Any,
    name: str,
    ranks: int,
    absent: list[list[tuple[int, int]]],
    memory: bool = False,
    is_sharded: bool = False,
) -> list[Any]:
    """Return the gradients, losses and weights of some steps, and the gradients that are remembered.

    Args:
        rank: this rank; one process does what all ranks do.
        group: the ranks; False for one process.
        name: the method's.
        ranks: the number of ranks.
        absent: for each step, the pairs of a rank and a task that it lacks.
        memory: whether absent tasks take part with their last gradients.
        is_sharded: whether parameters are DTensors on several ranks.
    """
    torch.manual_seed(0)
    model, method = Net(T).double(), METHODS[name]()
    if is_sharded and group is not False:
        sharded(model, mesh_of(group, ranks, ""))
    params = [*model.parameters(), *method.parameters()]
    opt = gk.SurgeryOptimizer(torch.optim.SGD(params, lr=0.1), method, memory=memory, process_group=group)
    results = []
    for step, lacking in enumerate(absent):
        x, y = data(step)
        losses: list[Tensor | None] = []
        for t in range(T):
            having = [r for r in range(ranks) if (r, t) not in lacking]
            if group is False:
                parts = [model.loss(t, *part(r, ranks, x, y)) for r in having]
                losses.append(sum(parts[1:], parts[0]) / ranks if parts else None)
            else:
                losses.append(model.loss(t, *part(rank, ranks, x, y)) if rank in having else None)
        for p in params:
            p.grad = None
        info = opt.backward(losses)
        remembered = opt.state_dict()["surgery"]["memory"] or []
        grads = [*(p.grad for p in params), *(g for row in remembered for g in row)]
        results.append(([None if g is None else whole(g) for g in grads], info.losses, info.weights))
        if step == 1:  # what is remembered can be loaded
            opt.load_state_dict(opt.state_dict())
    return results


def assert_near(results: list[Any], expected: list[Any]) -> None:
    """Assert that all steps' gradients, losses and weights are near, and missing where they are missing."""
    for (grads, *numbers), (expected_grads, *expected_numbers) in zip(results, expected, strict=True):
        for x, y in zip([*grads, *numbers], [*expected_grads, *expected_numbers], strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                torch.testing.assert_close(x, y, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)


ABSENT = {
    "on no rank": [[], [], []],
    "on all ranks": [[], [(0, 1), (1, 1)], [], [(0, 1), (1, 1)]],
    "on one rank": [[(1, 1)], [(0, 0), (1, 2)], []],
    "on all ranks, two of three": [[], [(0, 1), (1, 1), (0, 2), (1, 2)], []],
}


@pytest.mark.parametrize("absent", ABSENT)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:there is no surgery with one task")
def test_a_task_that_ranks_lack_counts_there_with_zero(pool: Pool, method: str, absent: str) -> None:
    expected = absent_ones(0, False, method, 2, ABSENT[absent])
    for results in pool.run(absent_ones, method, 2, ABSENT[absent], ranks=2):
        assert_near(results, expected)


@pytest.mark.parametrize("absent", ["on all ranks", "on all ranks, two of three"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:there is no surgery with one task")
def test_a_task_that_all_ranks_lack_with_dtensors(pool: Pool, method: str, absent: str) -> None:
    expected = absent_ones(0, False, method, 2, ABSENT[absent])
    for results in pool.run(absent_ones, method, 2, ABSENT[absent], False, True, ranks=2):
        assert_near(results, expected)


@pytest.mark.parametrize("absent", ABSENT)
@pytest.mark.parametrize("method", ["PCGrad", "GradVac", "MGDA"])
def test_absent_tasks_are_remembered(pool: Pool, method: str, absent: str) -> None:
    """Each rank remembers the whole gradients, so that any rank's checkpoint is complete."""
    expected = absent_ones(0, False, method, 2, ABSENT[absent], True)
    for results in pool.run(absent_ones, method, 2, ABSENT[absent], True, ranks=2):
        assert_near(results, expected)


@pytest.mark.parametrize("absent", ["on all ranks", "on all ranks, two of three"])
@pytest.mark.parametrize("method", ["PCGrad", "GradVac", "GradDrop"])
def test_parts_of_absent_tasks_are_remembered(pool: Pool, method: str, absent: str) -> None:
    """Each rank remembers its parts, and a checkpoint has whole gradients."""
    expected = absent_ones(0, False, method, 2, ABSENT[absent], True)
    for results in pool.run(absent_ones, method, 2, ABSENT[absent], True, True, ranks=2):
        assert_near(results, expected)


def by_experts(rank: int, group: Any, choices: list[list[int]]) -> list[Any]:
    """Return the gradients, losses and weights of steps in which rank r goes through expert ``choices[step][r]``."""
    torch.manual_seed(0)
    model, ranks = Experts(), 3
    results = []
    for step, of_ranks in enumerate(choices):
        x, y = data(step)

        def loss(t: int, r: int, x: Tensor = x, y: Tensor = y, of_ranks: list[int] = of_ranks) -> Tensor:
            return model.loss_by(of_ranks[r], t, *part(r, ranks, x, y))

        losses = [sum(loss(t, r) for r in range(ranks)) / ranks if group is False else loss(t, rank) for t in range(T)]
        model.zero_grad()
        info = gk.backward(losses, model, aggregator=gk.PCGrad(order=[1, 2, 0]), groups="module", process_group=group)
        results.append(([p.grad for p in model.parameters()], info.losses, info.weights, info.gramian))
    return results


def test_ranks_may_reach_different_parameters(pool: Pool) -> None:
    """Some are reached on one rank only, by a task or by all, and from step to step on others."""
    choices = [[0, 0, 0], [0, 1, 0], [1, 1, 1], [1, 0, 1]]
    expected = by_experts(0, False, choices)
    for results in pool.run(by_experts, choices, ranks=3):
        assert_near(results, expected)


def of_many_kinds(rank: int, group: Any, ranks: int) -> list[Any]:
    """Return the gradients, losses and weights for parameters of several dtypes and layouts."""
    torch.manual_seed(0)
    shapes = {"plain": (5, 3), "transposed": (3, 7), "scalar": (), "empty": (0, 4), "image": (2, 3, 4, 5)}
    params = {name: nn.Parameter(torch.randn(shape, dtype=torch.float64)) for name, shape in shapes.items()}
    params["transposed"] = nn.Parameter(torch.randn(7, 3, dtype=torch.float64).t())
    params["image"] = nn.Parameter(params["image"].detach().to(memory_format=torch.channels_last))
    params["complex"] = nn.Parameter(torch.randn(4, 3, dtype=torch.complex128))
    params["single"] = nn.Parameter(torch.randn(11))
    params["half"] = nn.Parameter(torch.randn(6, dtype=torch.bfloat16))
    results = []
    for step in range(2):
        c = torch.randn(BATCH, T, len(params), generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        # Each number is a multiple of 1/4 up to 4, such that bfloat16 sums of them are exact.
        c = (c * 2).round().clamp(-8, 8) / 4
        own = c if group is False else c[rank * BATCH // ranks : (rank + 1) * BATCH // ranks]
        mean = own.mean(0)
        sums = [(torch.view_as_real(p) if p.is_complex() else p).double().sum() for p in params.values()]
        losses = [mean[t] @ torch.stack(sums) for t in range(T)]
        method = gk.PCGrad(order=[1, 2, 0])
        info = gk.backward(losses, params.items(), aggregator=method, groups="parameter", process_group=group)
        assert all(p.grad is None or p.grad.stride() == p.stride() for p in params.values())
        results.append(([p.grad for p in params.values()], info.losses, info.gramian))
    return results


def test_all_dtypes_and_layouts(pool: Pool) -> None:
    """The second step is added to the first one's gradients."""
    for ranks in (2, 3):
        expected = of_many_kinds(0, False, ranks)
        for results in pool.run(of_many_kinds, ranks, ranks=ranks):
            for (grads, losses, M), (expected_grads, expected_losses, expected_M) in zip(
                results, expected, strict=True
            ):
                torch.testing.assert_close(losses, expected_losses, rtol=1e-12, atol=1e-12)
                # The Gramian has one dtype, float64; the rows of single and half precision round before.
                torch.testing.assert_close(M[:-2], expected_M[:-2], rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(M[-2], expected_M[-2], rtol=1e-6, atol=1e-6)
                torch.testing.assert_close(M[-1], expected_M[-1], rtol=2e-2, atol=2e-2)
                for g, e in zip(grads, expected_grads, strict=True):
                    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2}.get(e.dtype, 1e-12)
                    torch.testing.assert_close(g, e, rtol=tolerance, atol=tolerance)


def not_finite(rank: int, group: Any, name: str) -> list[Any]:
    """Return the gradients of a step with a loss that is NaN on rank 1, and those of a step after it."""
    torch.manual_seed(0)
    model, method = MultiHead(T).double(), METHODS[name]()
    results = []
    for step in range(3):
        x, y = part(rank, 2, *data(step)) if group is not False else data(step)
        losses = model.losses(x, y)
        if step == 1 and rank == (1 if group is not False else 0):
            losses[1] = losses[1] * torch.nan
        model.zero_grad()
        gk.backward(losses, model, aggregator=method, process_group=group)
        results.append([p.grad for p in model.parameters()])
    return results


@pytest.mark.parametrize("method", ["PCGrad", "GradVac", "MGDA", "Sum"])
def test_a_loss_that_is_not_finite_on_one_rank(pool: Pool, method: str) -> None:
    """All ranks get what one process would get, and their state is that of one process."""
    expected = not_finite(0, False, method)
    for results in pool.run(not_finite, method, ranks=2):
        for grads, expected_grads in zip(results, expected, strict=True):
            for g, e in zip(grads, expected_grads, strict=True):
                torch.testing.assert_close(g, e, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)


def shared_after_reach(rank: int, group: Any) -> Tensor | None:
    """Take a step that names shared parameters, after one in which rank 1 alone has no first task."""
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]

    def losses() -> list[Tensor | None]:
        return [params[0].sum() + params[1].sum(), params[0].square().sum()]

    gk.backward([None, losses()[1]] if rank == 1 else losses(), params, aggregator=gk.PCGrad(), process_group=group)
    gk.backward(losses(), params, aggregator=gk.PCGrad(), shared=params[:1], process_group=group)
    return params[0].grad


@pytest.mark.filterwarnings("ignore:there is no surgery")
def test_a_rank_knows_shared_parameters_from_what_its_tasks_reach(pool: Pool) -> None:
    """On rank 1 the flags of both tasks, ((False, False), (True, False)), equal the numbers of groups and the flags of
    shared parameters, ((0, 0), (True, False)), and must not be taken for them."""
    for grad in pool.run(shared_after_reach, ranks=2):
        assert grad is not None  # the tasks' gradients agree, so each step adds their sum
        assert torch.equal(grad, torch.full((3,), 0.5 + 2 + 1 + 2))
