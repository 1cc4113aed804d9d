"""Wrappers of a model that do not go with a step: all ranks raise, and tell what to do."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.pool import Pool
from tests.distributed.test_faults import Step, T


class Wrapped(NamedTuple):
    """What a step through a wrapper of the model has raised."""

    text: str
    untouched: bool


def refused(step: Step, group: Any) -> Wrapped:
    before = [p.grad for p in step.params.parameters()]
    with pytest.raises((ValueError, RuntimeError)) as raised:
        step.take(group)
    return Wrapped(str(raised.value), all(a is p.grad for a, p in zip(before, step.params.parameters(), strict=True)))


def through_fsdp1(rank: int, group: Any, original: bool, callables: bool, of_model: bool) -> Wrapped:
    """Take a step with parameters of FSDP1, or with other ones of which losses reach those of FSDP1."""
    step = Step(rank)
    model = FullyShardedDataParallel(
        step.model, process_group=group, use_orig_params=original, device_id=torch.device("cpu")
    )
    torch.manual_seed(0)
    scale = nn.Linear(1, 1)
    losses = [lambda t=t: model(step.x, step.y)[t] * scale(torch.ones(1)).sum() for t in range(T)]
    step.losses = losses if callables else [loss() for loss in losses]
    step.params = model if of_model else scale
    return refused(step, group)


@pytest.mark.parametrize("of_model", [False, True])
@pytest.mark.parametrize("callables", [False, True])
@pytest.mark.parametrize("original", [False, True])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_fsdp1_is_refused(pool: Pool, original: bool, callables: bool, of_model: bool) -> None:
    for text, untouched in pool.run(through_fsdp1, original, callables, of_model, ranks=2):
        assert "belongs to torch's FullyShardedDataParallel" in text
        assert "fully_shard" in text
        assert untouched


def through_zero(rank: int, group: Any, mark: str, of_model: bool) -> Wrapped:
    """Take a step with parameters that have the attribute that DeepSpeed gives them."""
    step = Step(rank)
    for number, p in enumerate(step.model.parameters()):
        setattr(p, mark, number)
    torch.manual_seed(0)
    scale = nn.Linear(1, 1)
    step.losses = [loss() * scale(torch.ones(1)).sum() for loss in step.losses]
    step.params = step.model if of_model else scale
    return refused(step, group)


@pytest.mark.parametrize("of_model", [False, True])
@pytest.mark.parametrize(("mark", "name"), [("ds_id", "DeepSpeed's ZeRO 3"), ("_hp_mapping", "DeepSpeed's ZeRO,")])
def test_deepspeed_is_refused(pool: Pool, mark: str, name: str, of_model: bool) -> None:
    for text, untouched in pool.run(through_zero, mark, of_model, ranks=2):
        assert f"belongs to {name}" in text
        assert "without DeepSpeed" in text
        assert untouched


def within_join(rank: int, group: Any) -> Wrapped:
    """Take a step within Join, and then one with another model, which is not within it."""
    step = Step(rank)
    model = DistributedDataParallel(step.model, process_group=group)
    step.params = step.model
    with Join([model]):
        step.losses = [model(step.x, step.y)[t] for t in range(T)]
        wrapped = refused(step, group)
    other = Step(rank)
    other.losses = list(DistributedDataParallel(other.model, process_group=group)(other.x, other.y)[:T])
    other.take(group)
    return wrapped


def test_join_is_refused(pool: Pool) -> None:
    for text, untouched in pool.run(within_join, ranks=2):
        assert "Join" in text
        assert "give all ranks as many batches" in text
        assert untouched
