"""Runs with sharded parameters on several ranks, compared with one process that has the whole batch."""

from typing import Any

import pytest
import torch

from tests.distributed.jobs import Run
from tests.distributed.pool import Pool
from tests.distributed.test_equal import check

METHODS = ["Sum", "PCGrad", "GradVac", "MGDA"]


@pytest.mark.parametrize("sharding", ["resharded", "kept", "of root", "heads left out", "tensor parallel"])
@pytest.mark.parametrize("method", METHODS)
def test_every_sharding_is_that_of_one_process(pool: Pool, method: str, sharding: str) -> None:
    check(pool, Run(method, sharding=sharding), 2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sharding", ["resharded", "replicas"])
def test_four_ranks(pool: Pool, method: str, sharding: str) -> None:
    check(pool, Run(method, sharding=sharding), 4)


@pytest.mark.parametrize("method", METHODS)
def test_float32(pool: Pool, method: str) -> None:
    check(pool, Run(method, torch.float32, sharding="resharded"), 2)


@pytest.mark.parametrize("method", ["Sum, report", "RLW", "Uncertainty", "GeometricMean", "UPGrad"])
def test_other_methods(pool: Pool, method: str) -> None:
    check(pool, Run(method, sharding="resharded"), 2)


@pytest.mark.parametrize("method", ["Sum", "PCGrad"])
@pytest.mark.parametrize("kind", ["update", "callables", "accumulate"])
def test_every_way_to_take_a_step(pool: Pool, method: str, kind: str) -> None:
    kinds: dict[str, Any] = {kind: True}
    check(pool, Run(method, sharding="resharded", **kinds), 2)


@pytest.mark.parametrize("options", ["parameter", "module", "shared", "conflict_lr"])
def test_groups_and_modifiers(pool: Pool, options: str) -> None:
    check(pool, Run("GradVac" if options == "parameter" else "PCGrad", options=options, sharding="resharded"), 2)
