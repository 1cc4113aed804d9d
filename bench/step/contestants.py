"""The contestants of a training step, written as their users would: a forward pass for each task, and AdamW at the end.

All train the same model in turn, because a model for each would not fit on most machines. Those that use torch's AdamW
also share its state, because the time of a step does not depend on the values. No contestant leaves a ``.grad``, so
that all start with the same memory.
"""

from collections.abc import Callable
from typing import Any

import torch

import gradkern as gk
from bench.peers import PYTORCH_OPTIMIZER, TORCHJD, Peers
from bench.step.model import MultiTask

BASELINE = "sum(losses).backward()"
LR = 1e-5
Step = Callable[[], None]


def methods() -> dict[str, dict[str, Any]]:
    """Return new arguments of ``gradkern.SurgeryOptimizer`` by name; they are new because they have a state."""
    return {
        "Sum": {"aggregator": gk.Sum()},
        "PCGrad": {"aggregator": gk.PCGrad()},
        "GradVac per parameter": {"aggregator": gk.GradVac(), "groups": "parameter"},
        "PCGrad, 45 % suppressed": {"aggregator": gk.PCGrad(), "suppression": gk.Suppression(0.45, seed=0)},
        "PCGrad, 45 % suppressed in blocks of 128": {
            "aggregator": gk.PCGrad(),
            "suppression": gk.Suppression(0.45, block=128, scope="all", seed=0),
        },
        "GradAttention": {"aggregator": gk.GradAttention()},
    }


def contestants(model: MultiTask, peers: Peers) -> dict[str, Step]:
    """Return the contestants' steps by name, the baseline first and other libraries last.

    Args:
        model: model that all contestants train.
        peers: peers to compare with.
    """
    capturable = model.batches.device.type == "cuda"  # torch's AdamW accepts it on GPUs only
    adamw = torch.optim.AdamW(model.parameters(), LR, fused=True, capturable=capturable)

    def baseline() -> None:
        sum(model().losses).backward()
        adamw.step()
        adamw.zero_grad()

    steps = {BASELINE: baseline}
    for name, arguments in methods().items():
        steps[f"gradkern {name}"] = _with_grad(model, gk.SurgeryOptimizer(adamw, **arguments))
    own = gk.optim.AdamW(model.parameters(), LR)
    for name, arguments in methods().items():
        steps[f"gradkern {name}, fused step"] = _fused(model, gk.SurgeryOptimizer(own, **arguments))
    if PYTORCH_OPTIMIZER in peers.found:
        steps[PYTORCH_OPTIMIZER] = _pytorch_optimizer(model, adamw)
    if TORCHJD in peers.found:
        steps[TORCHJD] = _torchjd(model, adamw)
        steps[f"{TORCHJD}, a pass per task"] = _torchjd_per_task(model, adamw)
    return steps


def _with_grad(model: MultiTask, opt: gk.SurgeryOptimizer) -> Step:
    def step() -> None:
        opt.backward(model().losses)
        opt.step()
        opt.zero_grad()

    return step


def _fused(model: MultiTask, opt: gk.SurgeryOptimizer) -> Step:
    def step() -> None:
        opt.update(model().losses)

    return step


def _pytorch_optimizer(model: MultiTask, adamw: torch.optim.Optimizer) -> Step:
    from pytorch_optimizer import PCGrad

    opt = PCGrad(adamw, reduction="sum")

    def step() -> None:
        opt.pc_backward(model().losses)
        opt.step()
        opt.zero_grad()

    return step


def _torchjd(model: MultiTask, adamw: torch.optim.Optimizer) -> Step:
    """Return TorchJD's step as its documentation writes it, with the features of each task's own pass.

    Each row of the Jacobian goes back through all tasks' passes, although it is zero in all but one. Rows are computed
    one at a time, because ``torch.vmap`` has no batched attention on a CPU and takes longer.
    """
    from torchjd.aggregation import PCGrad
    from torchjd.autojac import jac_to_grad, mtl_backward

    aggregator = PCGrad()

    def step() -> None:
        features, losses = model()
        mtl_backward(losses, features, parallel_chunk_size=1)
        jac_to_grad(model.encoder.parameters(), aggregator)
        adamw.step()
        adamw.zero_grad()

    return step


def _torchjd_per_task(model: MultiTask, adamw: torch.optim.Optimizer) -> Step:
    """Return TorchJD's step written by an expert user: a task's row goes back through that task's pass only."""
    from torchjd.aggregation import PCGrad
    from torchjd.autojac import jac, jac_to_grad

    aggregator, trunk = PCGrad(), list(model.encoder.parameters())

    def step() -> None:
        rows = []
        for head, loss in zip(model.heads, model().losses, strict=True):
            own = list(head.parameters())
            row = jac(loss, [*trunk, *own])
            rows.append(row[: len(trunk)])
            for p, g in zip(own, row[len(trunk) :], strict=True):
                p.grad = g.squeeze(0)
        for p, of_tasks in zip(trunk, zip(*rows, strict=True), strict=True):
            p.jac = torch.cat(of_tasks)
        del rows, row, of_tasks
        jac_to_grad(trunk, aggregator)
        adamw.step()
        adamw.zero_grad()

    return step
