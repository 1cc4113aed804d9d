"""A gradient scaler on several ranks: an overflow on one of them makes all of them skip the step."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import gradkern as gk
from tests.distributed.jobs import Net, mesh_of, sharded, whole
from tests.distributed.pool import Pool
from tests.models import MultiHead


def scaled(
    rank: int, group: Any, fused: bool, update: bool, is_sharded: bool = False, shard: bool = False
) -> list[tuple[float, list[torch.Tensor]]]:
    """Return the scale and the parameters after each of three steps; a loss of rank 1 overflows in the second."""
    torch.manual_seed(0)
    model = Net(3)
    if is_sharded:
        sharded(model, mesh_of(group, 2, ""))
    params = list(model.parameters())
    inner = (gk.optim.AdamW if fused else torch.optim.AdamW)(params, lr=1e-2)
    opt = gk.SurgeryOptimizer(inner, gk.PCGrad(), process_group=group, shard_optimizer=shard)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    torch.manual_seed(rank)
    results = []
    for step in range(3):
        losses = list(scaler.scale(model(torch.randn(8, 6), torch.randn(3, 8))[:3]))
        if step == 1 and rank == 1:
            losses[0] = losses[0] * torch.inf
        if update:
            opt.update(losses, max_norm=1.0, scaler=scaler)
        else:
            opt.zero_grad()
            opt.backward(losses)
            scaler.step(opt)
        scaler.update()
        results.append((scaler.get_scale(), [whole(p.detach()).clone() for p in params]))
    return results


@pytest.mark.parametrize(
    ("fused", "is_sharded", "shard"),
    [(fused, is_sharded, False) for fused in (False, True) for is_sharded in (False, True)] + [(True, False, True)],
)
@pytest.mark.parametrize("update", [False, True])
def test_an_overflow_on_one_rank_is_all_ranks_overflow(
    pool: Pool, fused: bool, update: bool, is_sharded: bool, shard: bool
) -> None:
    of_ranks = pool.run(scaled, fused, update, is_sharded, shard, ranks=2)
    for results in of_ranks:
        scales = [scale for scale, _ in results]
        assert scales == [64.0, 32.0, 32.0]
        (_, first), (_, second), (_, third) = results
        assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))
        assert not any(torch.equal(p, q) for p, q in zip(second, third, strict=True))
        assert all(torch.equal(p, q) for p, q in zip(third, of_ranks[0][2][1], strict=True))


def updates(
    opt: gk.SurgeryOptimizer, model: MultiHead, own: slice, scale: float | None, max_norm: float | None = None
) -> Iterator[gk.SurgeryInfo]:
    """Yield the results of three updates with a part of each batch; ``scale``: that of a scaler, None without one."""
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    for step in range(3):
        draw = torch.Generator().manual_seed(step)
        x, y = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((16, 6), (3, 16)))
        losses = model.losses(x[own], 3 * y[:, own])
        yield opt.update(losses if scaler is None else scaler.scale(losses), max_norm=max_norm, scaler=scaler)
        if scaler is not None:
            scaler.update()


def part(rank: int, group: Any) -> slice:
    """Return a rank's half of each batch; the whole for one process, whose group is False."""
    return slice(None) if group is False else slice(8 * rank, 8 * rank + 8)


def clipped(rank: int, group: Any, shard: bool, scale: float | None) -> list[torch.Tensor]:
    """Return the parameters after three updates, and the norms before clipping, without a scaler's scale."""
    torch.manual_seed(0)
    model = MultiHead().double()
    adamw = gk.optim.AdamW(model.parameters(), lr=1e-2)
    opt = gk.SurgeryOptimizer(adamw, gk.PCGrad(order=range(3)), process_group=group, shard_optimizer=shard)
    norms = []
    for info in updates(opt, model, part(rank, group), scale, max_norm=1.0):
        assert info.total_norm is not None
        norms.append(info.total_norm)
    return [*(p.detach() for p in model.parameters()), *norms]


@pytest.mark.parametrize("shard", [False, True])
def test_the_norm_is_that_of_gradients_without_the_scale(pool: Pool, shard: bool) -> None:
    expected = clipped(0, False, False, None)
    for results in pool.run(clipped, shard, 1024.0, ranks=2):
        for x, y in zip(results, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)  # float64, and another order of sums


def spoilt(rank: int, group: Any, name: str, update: bool) -> list[tuple[float, bool, Any]]:
    """Return of three steps the scale, whether anything has changed, and the method's state.

    In the second step an entry that rank 1 alone holds has an infinite gradient.
    """
    torch.manual_seed(0)
    model, method = Net(3), SPOILT[name]()
    sharded(model, mesh_of(group, 2, ""))
    params = list(model.parameters())
    opt = gk.SurgeryOptimizer(torch.optim.AdamW(params, lr=1e-2), method, process_group=group)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    torch.manual_seed(rank)
    results = []
    for step in range(3):
        hook = model.trunk[0].register_forward_hook(_last_is_infinite) if step == 1 else None
        losses = list(scaler.scale(model(torch.randn(8, 6), torch.randn(3, 8))[:3]))
        before = [whole(p.detach()).clone() for p in params], _state(opt)
        if update:
            opt.update(losses, scaler=scaler)
        else:
            opt.zero_grad()
            opt.backward(losses)
            scaler.step(opt)
        scaler.update()
        after = [whole(p.detach()).clone() for p in params], _state(opt)
        if hook is not None:
            hook.remove()
        changed = not all(map(torch.equal, before[0], after[0])), not all(map(torch.equal, before[1], after[1]))
        results.append((scaler.get_scale(), changed, after))
    return results


def _last_is_infinite(module: torch.nn.Module, given: Any, y: torch.Tensor) -> torch.Tensor:
    """Let the gradient of the last number of each row be infinite."""
    factor = torch.ones(y.shape[-1])
    factor[-1] = torch.inf
    y.register_hook(lambda g: g * factor)
    return y


def _state(opt: gk.SurgeryOptimizer) -> list[torch.Tensor]:
    """Return the tensors of the method's state."""
    state = opt.state_dict()["surgery"]["state"]
    return [x.clone() for x in state.values() if isinstance(x, torch.Tensor)]


SPOILT: dict[str, Callable[[], gk.Aggregator]] = {
    "Sum": gk.Sum,
    "TrimmedMean": lambda: gk.TrimmedMean(1),
    "GradDrop": lambda: gk.GradDrop(seed=3),
    "GradVac": gk.GradVac,
    "MoCo": gk.MoCo,
}


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("name", SPOILT)
def test_an_overflow_in_one_shard_is_all_ranks_overflow(pool: Pool, name: str, update: bool) -> None:
    """An update that is skipped leaves the method's state as it was."""
    of_ranks = pool.run(spoilt, name, update, ranks=2)
    for results in of_ranks:
        assert [scale for scale, _, _ in results] == [64.0, 32.0, 32.0]
        assert [params for _, (params, _), _ in results] == [True, False, True]
        if update:
            assert not results[1][1][1]
        for (_, _, (params, state)), (_, _, others) in zip(results, of_ranks[0], strict=True):
            assert all(map(torch.equal, [*params, *state], [*others[0], *others[1]]))


def looking_at_losses(rank: int, group: Any, name: str, scale: float | None) -> list[list[torch.Tensor]]:
    """Return the parameters, those of the method too, and the losses after each of three updates.

    Args:
        rank: this rank, which has half of each batch.
        group: the ranks; False for one process with the whole batch.
        name: a name of ``LOOKING``.
        scale: that of a scaler, a power of two; None without one.
    """
    torch.manual_seed(0)
    model, method = MultiHead().double(), LOOKING[name]()
    params = [*model.parameters(), *method.parameters()]
    opt = gk.SurgeryOptimizer(torch.optim.SGD(params, lr=1e-2), method, process_group=group)
    results = []
    for info in updates(opt, model, part(rank, group), scale):
        assert info.losses is not None
        seen = info.losses if scale is None else info.losses / scale
        results.append([*(p.detach().clone() for p in params), seen])
    return results


LOOKING: dict[str, Callable[[], gk.Aggregator]] = {
    "MGDA": lambda: gk.MGDA("loss"),
    "MGDA of both": lambda: gk.MGDA("loss+"),
    "Uncertainty": lambda: gk.Uncertainty(3),
    "GeometricMean": gk.GeometricMean,
    "DWA": gk.DWA,
    "Sum with a report": lambda: gk.Sum(report=True),
}


@pytest.mark.parametrize("name", LOOKING)
def test_a_method_that_looks_at_losses_sees_their_means_without_the_scale(pool: Pool, name: str) -> None:
    expected = looking_at_losses(0, False, name, None)
    of_ranks = pool.run(looking_at_losses, name, 1024.0, ranks=2)
    for results in of_ranks:
        for step, expected_step, of_first in zip(results, expected, of_ranks[0], strict=True):
            for x, y, z in zip(step, expected_step, of_first, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)  # float64, and another order of sums
                assert torch.equal(x, z)
