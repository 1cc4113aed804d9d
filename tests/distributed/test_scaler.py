"""A gradient scaler on several ranks: an overflow on one of them makes all of them skip the step."""

from typing import Any

import pytest
import torch

import gradkern as gk
from tests.distributed.jobs import Net, mesh_of, sharded, whole
from tests.distributed.pool import Pool


def scaled(
    rank: int, group: Any, fused: bool, update: bool, is_sharded: bool = False
) -> list[tuple[float, list[torch.Tensor]]]:
    """Return the scale and the parameters after each of three steps; a loss of rank 1 overflows in the second."""
    torch.manual_seed(0)
    model = Net(3)
    if is_sharded:
        sharded(model, mesh_of(group, 2, ""))
    params = list(model.parameters())
    inner = (gk.optim.AdamW if fused else torch.optim.AdamW)(params, lr=1e-2)
    opt = gk.SurgeryOptimizer(inner, gk.PCGrad(), process_group=group)
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


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("update", [False, True])
def test_an_overflow_on_one_rank_is_all_ranks_overflow(pool: Pool, fused: bool, update: bool, is_sharded: bool) -> None:
    of_ranks = pool.run(scaled, fused, update, is_sharded, ranks=2)
    for results in of_ranks:
        scales = [scale for scale, _ in results]
        assert scales == [64.0, 32.0, 32.0]
        (_, first), (_, second), (_, third) = results
        assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))
        assert not any(torch.equal(p, q) for p, q in zip(second, third, strict=True))
        assert all(torch.equal(p, q) for p, q in zip(third, of_ranks[0][2][1], strict=True))
