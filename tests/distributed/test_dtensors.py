"""Runs with sharded parameters on several ranks, compared with one process that has the whole batch."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

import gradkern as gk
from gradkern.ops import operators
from gradkern.ops.arguments import Coins, Mask
from tests.distributed.jobs import SHARDINGS, Net, Run, T, mesh_of, sharded, trained
from tests.distributed.pool import Pool
from tests.distributed.test_equal import check

METHODS = {"Sum": "", "PCGrad": "", "GradVac": "parameter", "MGDA": "", "UPGrad": "", "GradAttention": ""}
"""Methods, and the groups of parameters on which they work."""
LAYOUTS = [(sharding, ranks) for sharding in ("resharded", "kept", "tensor parallel") for ranks in (2, 3, 4)]
LAYOUTS += [("replicas", 4), ("tensor parallel shards", 4)]


@pytest.mark.parametrize(("sharding", "ranks"), LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_every_layout_is_that_of_one_process(pool: Pool, method: str, sharding: str, ranks: int) -> None:
    check(pool, Run(method, options=METHODS[method], sharding=sharding), ranks)


@pytest.mark.parametrize("sharding", ["gathered", "of root", "heads left out", "columns"])
@pytest.mark.parametrize("method", ["Sum", "PCGrad", "GradVac", "MGDA"])
def test_every_way_to_shard(pool: Pool, method: str, sharding: str) -> None:
    check(pool, Run(method, sharding=sharding), 2)


@pytest.mark.parametrize(
    ("sharding", "ranks"), [("resharded", 2), ("kept", 3), ("tensor parallel", 2), ("replicas", 4)]
)
@pytest.mark.parametrize("method", ["PCGrad", "GradVac", "UPGrad"])
def test_float32(pool: Pool, method: str, sharding: str, ranks: int) -> None:
    check(pool, Run(method, torch.float32, options=METHODS[method], sharding=sharding), ranks)


@pytest.mark.parametrize("method", ["Sum, report", "RLW", "Uncertainty", "Uncertainty, report", "GeometricMean"])
def test_other_methods(pool: Pool, method: str) -> None:
    check(pool, Run(method, sharding="resharded"), 2)


@pytest.mark.parametrize("method", ["Sum", "PCGrad"])
@pytest.mark.parametrize("sharding", ["resharded", "heads left out", "columns"])
@pytest.mark.parametrize("kind", ["update", "callables", "accumulate"])
def test_every_way_to_take_a_step(pool: Pool, method: str, sharding: str, kind: str) -> None:
    kinds: dict[str, Any] = {kind: True}
    check(pool, Run(method, sharding=sharding, **kinds), 2)


@pytest.mark.parametrize(
    "options", ["parameter", "module", "shared", "conflict_lr", "suppression", "suppression of all"]
)
def test_groups_and_modifiers(pool: Pool, options: str) -> None:
    check(pool, Run("GradVac" if options == "parameter" else "PCGrad", options=options, sharding="resharded"), 2)


@pytest.mark.parametrize("options", ["suppression", "suppression in blocks", "suppression of all"])
@pytest.mark.parametrize("sharding", ["resharded", "replicas"])
def test_masks_lie_where_one_process_has_them(pool: Pool, options: str, sharding: str) -> None:
    check(pool, Run("PCGrad", options=options, sharding=sharding), 4)


def begun_at(rank: int, group: Any, method: str) -> list[int]:
    """Return the units and the positions of random numbers that operators get in a step."""
    found: list[int] = []

    def watched(operator: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            for arg in args:
                found.extend(arg.units if isinstance(arg, Mask) else arg.positions if isinstance(arg, Coins) else ())
            return operator(*args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("gramian_tensors", "combine_tensors", "graddrop"):
            patch.setattr(operators, name, watched(getattr(operators, name)))
        trained(rank, group, Run(method, steps=1, options="suppression of all", sharding="resharded"), 3)
    return found


@pytest.mark.parametrize("method", ["PCGrad", "graddrop"])
def test_operators_get_multiples_of_four_random_numbers(pool: Pool, method: str) -> None:
    """Kernels draw four at a time, and parts begin anywhere."""
    of_ranks = pool.run(begun_at, method, ranks=3)
    assert all(number < 0 or number % 4 == 0 for found in of_ranks for number in found)
    assert all(max(found) > 0 for found in of_ranks)


def test_sampled_entries_of_replicas_count_once(pool: Pool) -> None:
    check(pool, Run("GradAttention", sharding="replicas"), 4)


def with_other_replicas(rank: int, group: Any, sharding: str, ranks: int) -> list[str]:
    """Take two steps with a model of another seed on each rank, and one with a model of one seed; return the errors."""
    errors = []
    for seed in (rank, rank, 0):
        torch.manual_seed(seed)
        model = Net(T)
        SHARDINGS[sharding](model, mesh_of(group, ranks, sharding))
        params = list(model.named_parameters())
        torch.manual_seed(1)
        losses = model(torch.randn(8, 6), torch.randn(T, 8))[:T]
        try:
            gk.backward(losses, params, aggregator=gk.PCGrad(), process_group=group)
            errors.append("")
        except ValueError as error:
            errors.append(str(error))
            assert all(p.grad is None for _, p in params)
    return errors


def test_replicas_with_other_values_are_found(pool: Pool) -> None:
    """Parts of two ranks that hold the same one must be alike; those of the others are of other parameters."""
    for first, second, same in pool.run(with_other_replicas, "replicas", 4, ranks=4):
        assert first.startswith("ranks 0 and 2 hold the same parts of DTensors in params")
        assert (second, same) == (first, "")
    for first, _, same in pool.run(with_other_replicas, "resharded", 2, ranks=2):
        assert (first, same) == ("", "")


@pytest.mark.parametrize("options", ["", "conflict_lr", "suppression", "suppression in blocks"])
@pytest.mark.parametrize("method", ["graddrop", "trimmed-mean"])
def test_methods_that_work_entry_by_entry(pool: Pool, method: str, options: str) -> None:
    """Parts begin within four random numbers, and within blocks of a mask."""
    check(pool, Run(method, options=options, sharding="resharded"), 3)


@pytest.mark.parametrize("method", ["graddrop", "trimmed-mean"])
def test_entries_of_replicas(pool: Pool, method: str) -> None:
    check(pool, Run(method, options="suppression", sharding="replicas"), 4)


def test_the_trimmed_mean_of_every_part(pool: Pool) -> None:
    check(pool, Run("trimmed-mean", sharding="columns"), 2)


@pytest.mark.parametrize("sharding", ["resharded", "tensor parallel", "heads left out"])
@pytest.mark.parametrize("method", ["modo", "sdmgrad"])
def test_a_second_batch(pool: Pool, method: str, sharding: str) -> None:
    check(pool, Run(method, second=True, sharding=sharding), 2)


@pytest.mark.parametrize(
    ("method", "sharding"),
    [("moco", "columns"), ("moco", "tensor parallel"), ("dbmtl", "resharded"), ("mconfig", "heads left out")],
)
def test_means_of_parts(pool: Pool, method: str, sharding: str) -> None:
    check(pool, Run(method, sharding=sharding), 2)


@pytest.mark.parametrize(
    ("options", "sharding"), [("parameter", "resharded"), ("suppression in blocks", "resharded"), ("", "replicas")]
)
def test_means_on_four_ranks(pool: Pool, options: str, sharding: str) -> None:
    check(pool, Run("moco", options=options, sharding=sharding), 4)


class Refused(NamedTuple):
    """What a step has raised, and whether every ``.grad`` is as before."""

    text: str
    untouched: bool


def refused(rank: int, group: Any, name: str) -> Refused | None:
    """Take a step that a rank refuses, by the name of its kind."""
    torch.manual_seed(0)
    model = Net(T).double()
    SHARDINGS["columns" if name.startswith("columns") else "resharded"](model, mesh_of(group, 2, ""))
    params: Any = list(model.named_parameters())
    options: dict[str, Any] = {"aggregator": gk.PCGrad(), "process_group": group}
    tensors = [p for _, p in params]
    for p in tensors:
        p.grad = torch.ones_like(p)
    torch.manual_seed(rank)
    *losses, h = model(torch.randn(8, 6).double(), torch.randn(T, 8).double())
    if name == "absent on one rank" and rank == 1:
        losses[1] = None
    if name == "alone":
        options["process_group"] = False
    if name == "features":
        options["features"] = h
    if name == "subset":
        options["aggregator"] = gk.GradAttention(update="subset")
    if name == "columns, mask":
        options["suppression"] = gk.Suppression(0.5)
    if name == "columns, entries":
        options["aggregator"] = gk.GradDrop()
    if name == "gathered module":
        params = model
    if name == "gathered list":
        params = list(model.named_parameters())
    if name == "hook":
        tensors[0].register_post_accumulate_grad_hook(lambda p: None)
    try:
        gk.backward(losses, params, **options)
    except (TypeError, ValueError, NotImplementedError) as error:
        untouched = all(p.grad is not None and bool((p.grad.full_tensor() == 1).all()) for p in tensors)
        return Refused(str(error), untouched)
    return None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("absent on one rank", r"losses\[1\] is None on rank 1 and not on rank 0"),
        ("alone", "params must not be DTensors; 'trunk.0.weight' is one, and this step is of one rank alone"),
        ("features", "features= is not for DTensors in params"),
        ("subset", r"with DTensors in params there is no GradAttention\(update='subset'\)"),
        ("columns, mask", r"Suppression is for DTensors that are cut along dimension 0; in params 'trunk.0.weight'"),
        ("columns, entries", r"GradDrop is for DTensors that are cut along dimension 0; in params 'trunk.0.weight'"),
        ("gathered module", "params is a Module with tensors under fully_shard that are no DTensors"),
        ("hook", "'trunk.0.weight' of shape .* has a post-accumulate hook|with a post-accumulate hook"),
    ],
)
def test_what_is_refused_by_name(pool: Pool, name: str, text: str) -> None:
    for raised in pool.run(refused, name, ranks=2):
        assert raised is not None
        assert re.search(text, raised.text), raised.text
        assert raised.untouched


def test_gathered_weights_in_a_list(pool: Pool) -> None:
    for raised in pool.run(refused, "gathered list", ranks=2):
        assert "params holds weights that fully_shard has gathered" in raised.text


def one_raises(rank: int, group: Any, name: str) -> tuple[str, list[Tensor | None]]:
    """Take a step in which rank 1 raises between backward passes; return the error and every ``.grad``."""
    model = Net(T)
    sharded(model, mesh_of(group, 2, "resharded"))
    params = list(model.named_parameters())
    x, y = torch.randn(8, 6), torch.randn(T, 8)
    losses: list[Any] = [lambda t=t: model.loss(t, x, y) for t in range(T)]

    def raising() -> Tensor:
        raise KeyError("the batch of rank 1")

    if rank == 1:
        losses[1] = raising
    try:
        gk.backward(losses, params, aggregator=gk.aggregator(name), process_group=group)
    except Exception as error:
        return f"{type(error).__name__}: {error}", [p.grad for _, p in params]
    return "", []


@pytest.mark.parametrize("method", ["pcgrad", "sum"])
def test_a_rank_that_raises_between_passes_does_so_at_once(tmp_path: Path, method: str) -> None:
    """The others raise by the timeout of the process group, and every ``.grad`` is as before."""
    pool = Pool(2, tmp_path, timeout=4)
    try:
        (other, *grads), (own, *own_grads) = pool.run(one_raises, method, ranks=2, seconds=40)
    finally:
        pool.close()
    assert own == "KeyError: 'the batch of rank 1'"
    assert other.startswith(("RuntimeError", "DistBackendError"))
    assert all(g is None for g in (*grads[0], *own_grads[0]))


def counted(rank: int, group: Any, kept: bool, name: str) -> dict[str, int]:
    """Return how many messages of each kind a step of one sharded group sends, its forward pass included."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    fully_shard(model, mesh=mesh_of(group, 2, ""), reshard_after_forward=True)
    model.set_reshard_after_backward(not kept)
    params = list(model.parameters())
    x = torch.randn(4, 8, requires_grad=True)
    counts: dict[str, int] = {}
    for _ in range(2):
        with CommDebugMode() as mode:
            y = model(x).clone()
            losses = [(y * (t + 1)).square().mean() for t in range(T)]
            gk.backward(losses, params, aggregator=gk.aggregator(name), process_group=group)
            model.reshard()
        counts = {str(op): n for op, n in mode.get_comm_counts().items()}
    return counts


@pytest.mark.parametrize("kept", [False, True])
def test_messages(pool: Pool, kept: bool) -> None:
    """Beside FSDP2's own there are two of the hosts, the losses and the dot products."""
    for counts in pool.run(counted, kept, "pcgrad", ranks=2):
        assert counts["c10d._reduce_scatter_base_"] == T
        assert counts["c10d._allgather_base_"] == 4 + (2 if kept else 1 + T)
    for counts in pool.run(counted, kept, "sum", ranks=2):
        assert counts["c10d._reduce_scatter_base_"] == 1
        assert counts["c10d._allgather_base_"] == 3 + 2
