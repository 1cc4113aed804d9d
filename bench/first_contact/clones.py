"""Copies of gradients that nothing else holds. There should be none.

A step copies a gradient that has more references than autograd's own. On a GPU autograd runs in a thread of its own,
which might still hold a gradient when the step looks: late, where the queue of launches is full, or the thread shares
the interpreter with other backward passes.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import gradkern as gk
from gradkern.gradients import aliasing

T, LAYERS, WIDTH, BATCH = 3, 20, 128, 32
"""More numbers than a small model has, whose gradients a CPU copies all, into a matrix."""
NONE, THREADS, BEHIND = "none", "backward passes of other threads", "a device far behind"
CYCLES = 20_000_000
"""Cycles of the GPU, some 10 ms, in which the host runs ahead by a whole step."""
OTHERS = 2
"""Threads that run backward passes of their own."""


def counted(device: torch.device, steps: int, say: Callable[[str], object]) -> list[dict[str, Any]]:
    """Return for each kind of load how many gradients the steps had, and how many were copied."""
    found = []
    for name in (NONE, THREADS, BEHIND) if device.type == "cuda" else (NONE, THREADS):
        with _busy(device) if name == THREADS else nullcontext():
            n_clones = _clones(device, steps, behind=name == BEHIND)
        found.append({"load": name, "steps": steps, "gradients": steps * T * 2 * LAYERS, "clones": n_clones})
        say(f"load: {name}: {n_clones} of {found[-1]['gradients']} gradients copied")
    return found


def _clones(device: torch.device, steps: int, behind: bool) -> int:
    model, losses = _problem(device)
    aggregator, n_clones, is_aliased = gk.PCGrad(), 0, aliasing._is_aliased

    def noted(*given: Any) -> bool:
        nonlocal n_clones
        aliased = is_aliased(*given)
        n_clones += aliased
        return aliased

    with patch.object(aliasing, "_is_aliased", noted):
        for _ in range(steps):
            if behind:
                torch.cuda._sleep(CYCLES)
            model.zero_grad()
            gk.backward(losses(), model, aggregator=aggregator)
            if behind:
                torch.cuda.synchronize(device)
    return n_clones


@contextmanager
def _busy(device: torch.device) -> Iterator[None]:
    """Run backward passes in other threads meanwhile."""
    done = threading.Event()

    def work() -> None:
        model, losses = _problem(device)
        while not done.is_set():
            model.zero_grad()
            sum(losses()).backward()

    threads = [threading.Thread(target=work) for _ in range(OTHERS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()


def _problem(device: torch.device) -> tuple[nn.Module, Callable[[], list[Tensor]]]:
    """Return a model of many small tensors, and a function that returns its losses, which share a pass."""
    with device:
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
        x, targets = torch.randn(BATCH, WIDTH), torch.randn(T, BATCH, WIDTH)

    def losses() -> list[Tensor]:
        y = model(x)
        return [(y - target).square().mean() for target in targets]

    return model, losses
