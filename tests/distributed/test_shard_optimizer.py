"""AdamW's moments cut among ranks: the steps of one process, with a part of its memory."""

import copy
import gc
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

import gradkern as gk
from tests.distributed.jobs import Run, T
from tests.distributed.pool import Pool
from tests.distributed.test_equal import assert_equal, check, in_small_buckets
from tests.distributed.test_words import Counted
from tests.models import MultiHead

TOLERANCE = 1e-12
"""Of float64 sums over examples and ranks in another order, a few roundings of numbers around 1."""
SHARD = {"update": True, "shard": True}


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("method", ["Sum", "PCGrad", "GradVac", "MGDA", "UPGrad", "GradAttention"])
def test_updates_are_those_of_one_process(pool: Pool, method: str, ranks: int) -> None:
    check(pool, Run(method, **SHARD), ranks)


@pytest.mark.parametrize("method", ["Uncertainty", "GradAttention of a subset", "moco", "graddrop"])
def test_methods_that_need_whole_rows(pool: Pool, method: str) -> None:
    check(pool, Run(method, **SHARD), 2)


@pytest.mark.parametrize("method", ["Sum", "PCGrad"])
@pytest.mark.parametrize("kind", ["ddp", "callables", "features"])
def test_every_way_to_compute_losses(pool: Pool, method: str, kind: str) -> None:
    check(pool, Run(method, **SHARD, **{kind: True}), 2)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("ranks", [2, 3])
def test_backward_and_step(pool: Pool, accumulate: bool, ranks: int) -> None:
    check(pool, Run("PCGrad", fused=True, shard=True, accumulate=accumulate), ranks)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    "options",
    ["parameter", "module", "shared", "suppression", "suppression of all", "suppression in blocks", "conflict_lr"],
)
def test_groups_and_modifiers(pool: Pool, options: str, ranks: int) -> None:
    check(pool, Run("GradVac" if options == "parameter" else "PCGrad", options=options, **SHARD), ranks)


@pytest.mark.parametrize("sharding", ["resharded", "heads left out", "tensor parallel"])
def test_beside_sharded_parameters(pool: Pool, sharding: str) -> None:
    check(pool, Run("PCGrad", sharding=sharding, **SHARD), 2)


@pytest.mark.parametrize("options", ["", "suppression of all"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_many_buckets(pool: Pool, options: str, ranks: int) -> None:
    run = Run("GradVac", options=options, **SHARD)
    assert_equal(pool.run(in_small_buckets, run, ranks, ranks=ranks), run)


def test_float32(pool: Pool) -> None:
    check(pool, Run("GradVac", torch.float32, **SHARD), 4)


class Layouts(nn.Module):
    """A model with parameters of many layouts: some are cut by rows, some are not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 2).to(memory_format=torch.channels_last)  # 5 rows, the last rank has fewer
        self.turned = nn.Parameter(torch.randn(5, 7).t())  # its rows are not vectors of its memory
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.row = nn.Parameter(torch.randn(1, 7))
        self.few = nn.Parameter(torch.randn(2, 7))
        self.low = nn.Parameter(torch.randn(7, 4).bfloat16().float())
        self.empty = nn.Parameter(torch.randn(4, 0))

    def losses(self, x: Tensor) -> list[Tensor]:
        """Return three losses; the last one reaches no convolution."""
        h = self.conv(x).mean((2, 3)) @ self.turned.t() * self.scale + self.row
        z = (x.mean((1, 2, 3)).unsqueeze(1) + self.few.sum(0)) @ self.low
        return [h.square().mean() + self.empty.sum(), (h - 1).abs().mean() + z.square().mean(), (z + 1).square().mean()]


def of_layouts(rank: int, group: Any, ranks: int, absent: list[int | None]) -> tuple[list[Tensor], dict[str, Any]]:
    """Return the parameters after some updates, and this rank's state; one task is absent in some of the steps."""
    torch.manual_seed(0)
    model = Layouts().double()
    adamw = gk.optim.AdamW(model.named_parameters(), lr=1e-2, amsgrad=True)
    opt = gk.SurgeryOptimizer(adamw, gk.PCGrad(order=range(3)), process_group=group, shard_optimizer=True)
    for missing in absent:
        x = torch.randn(12, 3, 4, 4, dtype=torch.float64)
        losses: list[Any] = model.losses(x[12 * rank // ranks : 12 * (rank + 1) // ranks])
        if missing is not None:
            losses[missing] = None
        opt.update(losses, max_norm=1.0)
    return [p.detach() for p in model.parameters()], {n: adamw.state[p] for n, p in model.named_parameters()}


@pytest.mark.filterwarnings("ignore:there is no surgery")  # of a step with one task
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_layouts_and_steps_with_other_tasks(pool: Pool, ranks: int) -> None:
    """Which parameters are shared changes from step to step, and so do the messages; the moments stay."""
    absent = [None, 1, None, 0, 2]
    expected, expected_state = of_layouts(0, False, 1, absent)
    results = pool.run(of_layouts, ranks, absent, ranks=ranks)
    for params, _ in results:
        for p, q, first in zip(params, expected, results[0][0], strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=TOLERANCE)
            assert torch.equal(p, first)
    for name, state in expected_state.items():
        parts = [own[name] for _, own in results]
        for key, x in state.items():
            if name in ("turned", "scale", "row", "empty") or (name == "few" and ranks > 2) or key == "step":
                assert all(torch.equal(part[key], parts[0][key]) for part in parts)
                together = parts[0][key]
            else:
                together = torch.cat([part[key].to_local() for part in parts])
            torch.testing.assert_close(together, x, rtol=0, atol=TOLERANCE)


def numbers(rank: int, group: Any, ranks: int, method: str) -> tuple[int, int, list[int], bool]:
    """Return how many numbers this rank's moments have, and the model's parameters, and the words of three updates."""
    torch.manual_seed(0)
    width = 96  # as in test_words.py
    trunk = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
    heads = nn.ModuleList(nn.Linear(width, width) for _ in range(T))
    params = [*trunk.parameters(), *heads.parameters()]
    adamw = gk.optim.AdamW(params)
    opt = gk.SurgeryOptimizer(adamw, gk.aggregator(method), process_group=group, shard_optimizer=True)
    words = []
    for _ in range(3):
        h = trunk(torch.randn(4, width))
        losses = [head(h).square().mean() for head in heads]
        with Counted() as counted:
            opt.update(losses, max_norm=1.0)
        words.append(counted.words())
    held = sum(adamw.state[p]["exp_avg"].to_local().untyped_storage().nbytes() // 4 for p in params)
    P, own = (sum(p.numel() for p in module.parameters()) for module in (trunk, heads))
    return held, P + own, [n - (T + 1) * P - 2 * own for n in words], all(p.grad is None for p in params)


@pytest.mark.parametrize("ranks", [2, 4])
def test_as_many_words_and_a_part_of_the_memory(pool: Pool, ranks: int) -> None:
    for held, P, more, no_grad in pool.run(numbers, ranks, "pcgrad", ranks=ranks):
        assert held == P // ranks
        assert more == [0, 0, 0]
        assert no_grad


STEPS, STOP = 6, 3


class Training:
    """A model and its optimizer, whose steps are numbered.

    Args:
        group: the ranks; False for one process, which has the whole batches.
        shard: whether the moments are cut.
        seed: of the model.
    """

    def __init__(self, group: Any, shard: bool, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = MultiHead(T).double()
        self.adamw = gk.optim.AdamW(self.model.named_parameters(), lr=1e-2)
        self.opt = gk.SurgeryOptimizer(
            self.adamw, gk.GradVac(beta=0.5, order=range(T)), process_group=group, shard_optimizer=shard
        )

    def take(self, first: int, last: int, rank: int, ranks: int) -> list[Tensor]:
        """Take some steps with a rank's part of their batches, and return the parameters."""
        own = slice(rank * 24 // ranks, (rank + 1) * 24 // ranks)
        for step in range(first, last):
            draw = torch.Generator().manual_seed(step)
            x, y = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((24, 6), (T, 24)))
            self.opt.update(self.model.losses(x[own], 3 * y[:, own]), max_norm=1.0)
        return [p.detach().clone() for p in self.model.parameters()]

    def parts(self, **options: Any) -> dict[str, Any]:
        """Return the states of the model and the optimizer."""
        opt = get_optimizer_state_dict(self.model, self.opt, options=StateDictOptions(**options))
        return {"model": self.model.state_dict(), "opt": opt}

    def load(self, parts: dict[str, Any], **options: Any) -> None:
        """Load such states."""
        self.model.load_state_dict(parts["model"])
        set_optimizer_state_dict(self.model, self.opt, parts["opt"], options=StateDictOptions(**options))


def first_half(rank: int, group: Any, folder: str) -> dict[str, Any]:
    """Save a run of four ranks in its middle, in parts; return its state, whole."""
    run = Training(group, True, 0)
    run.take(0, STOP, rank, 4)
    parts = run.parts()
    moments = [x for state in parts["opt"]["state"].values() for key, x in state.items() if key != "step"]
    assert sum(isinstance(x, DTensor) for x in moments) >= 8
    dcp.save(parts, checkpoint_id=folder, process_group=group)
    return run.parts(full_state_dict=True, cpu_offload=True)


def second_half(rank: int, group: Any, shard: bool, folder: str, ranks: int) -> list[Tensor]:
    """Return the parameters of another run that goes on from there."""
    run = Training(group, shard, 1)
    parts = run.parts()
    dcp.load(parts, checkpoint_id=folder, process_group=group or None, no_dist=ranks == 1)
    run.load(parts)
    return run.take(STOP, STEPS, rank, ranks)


def second_half_of_whole(rank: int, group: Any, shard: bool, whole: dict[str, Any]) -> list[Tensor]:
    """Return the parameters of another run that goes on from a whole state."""
    run = Training(group, shard, 1)
    run.load(copy.deepcopy(whole), full_state_dict=True)
    return run.take(STOP, STEPS, rank, 4)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_goes_on_on_other_ranks_cut_or_whole(pool: Pool, tmp_path: Path) -> None:
    expected = Training(False, False, 0).take(0, STEPS, 0, 1)
    whole = pool.run(first_half, str(tmp_path), ranks=4)[0]
    results = [params for shard in (True, False) for params in pool.run(second_half, shard, str(tmp_path), 2, ranks=2)]
    results += pool.run(second_half, True, str(tmp_path), 4, ranks=4)
    results.append(second_half(0, False, True, str(tmp_path), 1))
    for shard in (True, False):
        results += pool.run(second_half_of_whole, shard, whole, ranks=4)
    for params in results:
        for p, q in zip(params, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=TOLERANCE)


def test_the_whole_state_is_that_of_one_process(pool: Pool, tmp_path: Path) -> None:
    run = Training(False, True, 0)
    run.take(0, STOP, 0, 1)
    expected = run.parts()["opt"]["state"]
    whole = pool.run(first_half, str(tmp_path), ranks=4)[0]["opt"]["state"]
    assert whole.keys() == expected.keys()
    for name, state in expected.items():
        for key, x in state.items():
            torch.testing.assert_close(whole[name][key], x, rtol=0, atol=TOLERANCE)


def loaded(rank: int, group: Any, state: dict[str, Any]) -> list[list[Tensor]]:
    """Return the parameters of a run that loads the state of one process, and of one that loads its own in between."""
    results = []
    for again in (False, True):
        run = Training(group, True, 0)
        run.take(0, STOP, rank, 2)
        run.opt.load_state_dict(copy.deepcopy(state))
        if again:
            run.take(STOP, STOP + 1, rank, 2)
            run.opt.load_state_dict(copy.deepcopy(run.opt.state_dict()))
        results.append(run.take(STOP + again, STEPS, rank, 2))
    return results


def test_a_state_of_one_process(pool: Pool) -> None:
    run = Training(False, False, 0)
    run.take(0, STOP, 0, 1)
    state = copy.deepcopy(run.opt.state_dict())
    expected = run.take(STOP, STEPS, 0, 1)
    for results in pool.run(loaded, state, ranks=2):
        for params in results:
            for p, q in zip(params, expected, strict=True):
                torch.testing.assert_close(p, q, rtol=0, atol=TOLERANCE)


def of_rank_0(rank: int, group: Any, path: str) -> str | None:
    """Return the error of a rank that loads what the first one has saved, if there is one."""
    run = Training(group, True, 0)
    run.take(0, 2, rank, 2)
    if rank == 0:
        torch.save(run.opt.state_dict(), path)
    torch.distributed.barrier(group)
    before = dict(run.adamw.state)
    try:
        run.opt.load_state_dict(torch.load(path, weights_only=False))
    except ValueError as error:
        assert all(run.adamw.state[p] is state for p, state in before.items())
        return str(error)
    return None


def test_a_rank_refuses_the_moments_of_another(pool: Pool, tmp_path: Path) -> None:
    first, second = pool.run(of_rank_0, str(tmp_path / "state.pt"), ranks=2)
    assert first is None
    assert second is not None
    assert "another rank's part" in second


def refused(rank: int, group: Any, what: str) -> str:
    """Return the error of an update whose ranks differ in something."""
    torch.manual_seed(0)
    model = MultiHead(T)
    adamw = gk.optim.AdamW(model.parameters())
    cut = what != "shard_optimizer" or rank == 0
    opt = gk.SurgeryOptimizer(adamw, gk.PCGrad(), process_group=group, shard_optimizer=cut)
    p, max_norm, scaler = next(model.parameters()), 1.0, None
    if rank == 1:
        p.grad = torch.ones_like(p) if what == "grad" else None
        max_norm = 2.0 if what == "max_norm" else 1.0
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0) if what == "scaler" else None
    if rank == 1 and what == "hook":
        p.register_post_accumulate_grad_hook(lambda p: None)
    losses = model.losses(torch.randn(8, 6), torch.randn(T, 8))
    with pytest.raises(ValueError, match="differ") as info:
        opt.update(losses if scaler is None else scaler.scale(losses), max_norm=max_norm, scaler=scaler)
    assert not adamw.state
    return str(info.value)


@pytest.mark.parametrize("what", ["shard_optimizer", "grad", "hook", "max_norm", "scaler"])
def test_all_ranks_take_the_same_update(pool: Pool, what: str) -> None:
    told = "shard_optimizer, True on some ranks alone: " if what == "shard_optimizer" else "max_norm or scaler: "
    for text in pool.run(refused, what, ranks=2):
        assert told + "those of rank 1" in text


def alone_in_the_end(rank: int, group: Any, ranks: int) -> list[Tensor]:
    """Return the parameters after updates of two wrappers of one AdamW, the last one of each rank by itself."""
    run = Training(group, True, 0)
    run.take(0, 2, rank, ranks)
    run.opt = gk.SurgeryOptimizer(run.adamw, gk.PCGrad(order=range(T)), process_group=False)
    return run.take(2, 4, 0, 1)


def test_another_wrapper_of_the_optimizer_does_not_cut(pool: Pool) -> None:
    expected = alone_in_the_end(0, False, 1)
    for params in pool.run(alone_in_the_end, 2, ranks=2):
        for p, q in zip(params, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=TOLERANCE)


def group_left(rank: int, group: Any) -> bool:
    """Return whether a group is gone that is destroyed after the optimizer that took steps with it."""
    own = torch.distributed.new_group([0, 1])
    run = Training(own, True, 0)
    run.take(0, 2, rank, 2)
    held = weakref.ref(own)
    torch.distributed.destroy_process_group(own)
    del own, run
    gc.collect()
    return held() is None


def test_a_group_that_is_destroyed_is_not_held(pool: Pool) -> None:
    assert pool.run(group_left, ranks=2) == [True, True]


def by_zero(rank: int, group: Any) -> list[list[Tensor]]:
    """Return the parameters by torch's optimizer that cuts any other one's state, and by that one whole."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # its import takes seconds

    results = []
    for cut in (True, False):
        torch.manual_seed(0)
        model = MultiHead(T).double()
        args: dict[str, Any] = {"process_group": group} if cut else {}
        kind = partial(ZeroRedundancyOptimizer, optimizer_class=torch.optim.RMSprop) if cut else torch.optim.RMSprop
        opt = gk.SurgeryOptimizer(kind(model.parameters(), lr=1e-2, **args), gk.UPGrad(), process_group=group)
        torch.manual_seed(rank)
        for _ in range(3):
            opt.update(model.losses(torch.randn(8, 6).double(), torch.randn(T, 8).double()), max_norm=1.0)
        results.append([p.detach() for p in model.parameters()])
    return results


def test_torchs_own_optimizer_cuts_others(pool: Pool) -> None:
    for cut, whole in pool.run(by_zero, ranks=2):
        assert all(map(torch.equal, cut, whole))


def test_only_an_adamw_of_ours_is_cut() -> None:
    params = [nn.Parameter(torch.ones(3))]
    for inner in (torch.optim.AdamW(params), torch.optim.SGD(params, lr=0.1)):
        with pytest.raises(TypeError, match=f"optimizer must be a gradkern.optim.AdamW.*, got {type(inner).__name__}"):
            gk.SurgeryOptimizer(inner, gk.PCGrad(), shard_optimizer=True)
    with pytest.raises(TypeError, match="shard_optimizer must be True or False, got 1"):
        gk.SurgeryOptimizer(gk.optim.AdamW(params), gk.PCGrad(), shard_optimizer=1)
