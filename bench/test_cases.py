"""``pytest bench``: the quick sweep on the CPU, with a benchmark for each contestant and a group for each case."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.cases import Case, quick
from bench.contestants import contestants
from bench.inputs import Inputs
from bench.peers import find_peers

CPU = torch.device("cpu")
PEERS = find_peers(CPU)
TAKING_PART = [(case, name) for case in quick() for name in contestants(Inputs(case, CPU), PEERS)]


@pytest.mark.parametrize(("case", "name"), TAKING_PART, ids=lambda value: str(value).replace(" ", "-"))
@pytest.mark.benchmark(max_time=0.2, min_rounds=3)
def test_contestant(benchmark: Callable[..., Any], case: Case, name: str) -> None:
    """Benchmark one contestant of one case."""
    benchmark.group = str(case)  # type: ignore[attr-defined]
    run = contestants(Inputs(case, CPU), PEERS)[name]
    run()  # compiles, and makes the inputs
    benchmark(run)
