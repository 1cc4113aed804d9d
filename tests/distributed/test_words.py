"""The words that a step moves: those of (T + 1) vectors of all parameters, times (R - 1) / R on each rank."""

from typing import Any

import pytest
import torch
from torch import nn

import gradkern as gk
from gradkern.distributed import comm
from tests.distributed.pool import Pool

T = 3
WIDTH = 96
"""Divisible by 8 times the numbers of ranks, so that no shard has a gap."""


class Counted:
    """Counts the words that collectives move per rank, in R / (R - 1): of vectors sent to all, and of results."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, torch.dtype]] = []

    def __enter__(self) -> "Counted":
        self._before = comm._all_gather, comm._all_to_all
        gather, scatter = self._before

        def all_gather(x: torch.Tensor, shard: torch.Tensor, **kwargs: Any) -> Any:
            self.calls.append(("all-gather", x.numel(), x.dtype))
            return gather(x, shard, **kwargs)

        def all_to_all(received: torch.Tensor, x: torch.Tensor, **kwargs: Any) -> Any:
            self.calls.append(("all-to-all", x.numel(), x.dtype))
            return scatter(received, x, **kwargs)

        comm._all_gather, comm._all_to_all = all_gather, all_to_all
        return self

    def __exit__(self, *error: object) -> None:
        comm._all_gather, comm._all_to_all = self._before

    def words(self) -> int:
        """Return the number of float32 words; all messages beside them are integers and float64."""
        return sum(n for _, n, dtype in self.calls if dtype == torch.float32)

    def others(self) -> int:
        """Return the number of all other numbers."""
        return sum(n for _, n, dtype in self.calls if dtype != torch.float32)


def steps(rank: int, group: Any, heads: bool, method: str) -> tuple[list[int], list[int], int, int]:
    """Return the words and the other numbers of three steps, the shared and the unshared parameters' numbers."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    own = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(T if heads else 0))
    params = [*trunk.parameters(), *own.parameters()]
    words, others = [], []
    for _ in range(3):
        h = trunk(torch.randn(4, WIDTH))
        losses = [(own[t](h) if heads else h * (t + 1)).square().mean() for t in range(T)]
        with Counted() as counted:
            gk.backward(losses, params, aggregator=gk.aggregator(method), process_group=group)
        words.append(counted.words())
        others.append(counted.others())
    return words, others, sum(p.numel() for p in trunk.parameters()), sum(p.numel() for p in own.parameters())


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_surgery_moves_t_plus_one_words_for_each_parameter(pool: Pool, ranks: int) -> None:
    for words, others, P, _ in pool.run(steps, False, "pcgrad", ranks=ranks):
        assert words == [(T + 1) * P] * 3
        assert max(others) <= ranks * 100


def test_parameters_of_one_task_move_two_words(pool: Pool) -> None:
    for words, _, P, own in pool.run(steps, True, "pcgrad", ranks=2):
        assert words == [(T + 1) * P + 2 * own] * 3


def test_whole_rows_move_two_words_for_each_task(pool: Pool) -> None:
    for words, _, P, own in pool.run(steps, True, "moco", ranks=2):
        assert words == [2 * T * (P + own)] * 3


def in_order(rank: int, group: Any) -> list[str]:
    """Return the order of forward passes and messages in the second step."""
    torch.manual_seed(0)
    layer = nn.Linear(WIDTH, WIDTH)
    x = torch.randn(4, WIDTH)
    events: list[str] = []

    def loss(t: int) -> torch.Tensor:
        events.append(f"task {t}")
        return (layer(x) * (t + 1)).square().mean()

    counted = Counted()
    for _ in range(2):
        events.clear()
        with counted:
            scatter = comm._all_to_all

            def noting(*args: Any, scatter: Any = scatter, **kwargs: Any) -> Any:
                events.append("shards")
                return scatter(*args, **kwargs)

            comm._all_to_all = noting
            losses = [lambda t=t: loss(t) for t in range(T)]
            gk.backward(losses, layer, aggregator=gk.PCGrad(), process_group=group)
    return events


def test_a_row_is_reduced_while_the_next_backward_pass_runs(pool: Pool) -> None:
    """From the second step on the ranks know which parameters are shared."""
    for events in pool.run(in_order, ranks=2):
        assert events == ["task 0", "shards", "task 1", "shards", "task 2", "shards"]


def test_a_weighted_sum_moves_two_words(pool: Pool) -> None:
    for words, _, P, own in pool.run(steps, True, "sum", ranks=4):
        assert words == [2 * (P + own)] * 3
