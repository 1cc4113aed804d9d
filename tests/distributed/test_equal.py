"""Runs on several ranks, each with its part of a batch, compared with one process that has the whole batch."""

from functools import lru_cache
from typing import Any

import pytest
import torch

from gradkern.aggregators.methods import METHODS as TABLE
from gradkern.distributed import buckets
from tests.distributed.jobs import METHODS, OPTIONS, Result, Run, T, trained
from tests.distributed.pool import Pool

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6}
"""Relative to the largest parameter: five steps, whose sums over examples and ranks are rounded in another order."""


@lru_cache
def alone(run: Run) -> Result:
    """Return the result of one process."""
    return trained(0, None, run, 1)


def assert_equal(results: list[Result], run: Run) -> None:
    """Assert that all ranks have the same bits, and those of one process but for rounding."""
    expected, tolerance = alone(run), TOLERANCES[run.dtype]
    for result in results:
        for p, q, first in zip(result.params, expected.params, results[0].params, strict=True):
            assert torch.equal(p, first)
            torch.testing.assert_close(p, q, rtol=0, atol=tolerance * max(1.0, q.abs().max().item()))
        for info, other, first in zip(result.infos, expected.infos, results[0].infos, strict=True):
            for name in ("losses", "gramian", "weights", "targets", "kept", "step_scale", "total_norm"):
                x, y, z = (getattr(i, name) for i in (info, other, first))
                assert (x is None) == (y is None), name
                if x is not None:
                    assert torch.equal(x, z), name
                    scale = y.abs().max().item()
                    torch.testing.assert_close(x, y, rtol=0, atol=10 * tolerance * max(1.0, scale), msg=name)


def assert_same_state(results: list[Result]) -> None:
    """Assert that the method's state, its own generator's too, has the same bits on all ranks."""
    states = [result.state["surgery"]["state"] for result in results]
    for state in states[1:]:
        for key, x in state.items():
            assert torch.equal(x, states[0][key]) if isinstance(x, torch.Tensor) else type(x) is type(states[0][key])


def check(pool: Pool, run: Run, ranks: int) -> list[Result]:
    """Run on some ranks, and compare."""
    results = pool.run(trained, run, ranks, ranks=ranks)
    assert_equal(results, run)
    assert_same_state(results)
    return results


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_that_of_one_process(pool: Pool, method: str, ranks: int) -> None:
    check(pool, Run(method), ranks)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("method", ["Sum", "PCGrad", "GradVac", "MGDA", "UPGrad", "GradAttention"])
def test_in_distributed_data_parallel(pool: Pool, method: str, ranks: int) -> None:
    check(pool, Run(method, ddp=True, options="parameter" if method == "GradVac" else ""), ranks)


@pytest.mark.parametrize("name", [name for name, method in TABLE.items() if method.tasks in (None, T)])
def test_every_method_of_the_table(pool: Pool, name: str) -> None:
    check(pool, Run(name, second=TABLE[name].second), 2)


@pytest.mark.parametrize("run", [Run("Uncertainty", options="conflict_lr"), Run("Uncertainty", accumulate=True)])
@pytest.mark.parametrize("sharding", ["", "resharded"])
def test_parameters_of_a_method_are_trained_in_every_kind_of_step(pool: Pool, run: Run, sharding: str) -> None:
    check(pool, run._replace(sharding=sharding), 2)


@pytest.mark.parametrize("method", ["Sum", "PCGrad", "GradVac", "MGDA", "UPGrad"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_float32(pool: Pool, method: str, ranks: int) -> None:
    check(pool, Run(method, torch.float32), ranks)


@pytest.mark.parametrize("method", ["Sum", "PCGrad", "GradVac"])
@pytest.mark.parametrize("kind", ["unused", "update", "callables", "accumulate", "features"])
def test_every_way_to_take_a_step(pool: Pool, method: str, kind: str) -> None:
    kinds: dict[str, Any] = {kind: True}
    check(pool, Run(method, **kinds), 2)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("options", [name for name in OPTIONS if name])
def test_groups_and_modifiers(pool: Pool, options: str, ranks: int) -> None:
    check(pool, Run("GradVac" if options == "parameter" else "PCGrad", options=options), ranks)


def in_small_buckets(rank: int, group: Any, run: Run, ranks: int) -> Result:
    """Return the result of a run whose buckets are full with 200 bytes, as with parameters of more than 25 MB."""
    before, buckets.BYTES = buckets.BYTES, 200
    buckets.buckets_of.cache_clear()
    try:
        return trained(rank, group, run, ranks)
    finally:
        buckets.BYTES = before
        buckets.buckets_of.cache_clear()


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("options", ["", "parameter", "suppression of all"])
@pytest.mark.parametrize("method", ["GradVac", "GradAttention", "MoCo", "Sum"])
def test_many_buckets(pool: Pool, method: str, options: str, ranks: int) -> None:
    run = Run({"MoCo": "moco"}.get(method, method), options=options)
    assert_equal(pool.run(in_small_buckets, run, ranks, ranks=ranks), run)


def test_one_rank_of_a_group_is_alone(pool: Pool) -> None:
    check(pool, Run("PCGrad"), 1)


def test_runs_have_the_same_bits(pool: Pool) -> None:
    run = Run("PCGrad", torch.float32)
    first, second = (pool.run(trained, run, 4, ranks=4) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.params, b.params, strict=True))
        assert all(torch.equal(i.gramian, j.gramian) for i, j in zip(a.infos, b.infos, strict=True))
