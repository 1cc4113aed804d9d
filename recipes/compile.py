"""torch.compile, in three ways.

A compiled function does not tell which of its outputs came from which parameter: where there is no path, its backward
pass gives zeros. So where all heads are inside of one compiled graph, every loss seems to reach every head, and
``shared=`` has to say which parameters are under surgery.
"""

from collections.abc import Callable

import torch
import torch._functorch.config
import torch.compiler.config
from tasks import Model, batches, task_losses
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import gradkern as gk

BACKEND = "inductor"
METHOD = gk.PCGrad(order=[0, 1, 2])  # fixed, to compare the three ways: inductor draws random numbers of its own


def task_by_task(model: Model) -> Callable[[Tensor, Tensor], None]:
    """A compiled forward pass for each task: losses as callables, each with a graph of its own."""
    trunk = torch.compile(model.trunk, backend=BACKEND)

    def backward(x: Tensor, y: Tensor) -> None:
        losses = [lambda t=t: nn.functional.mse_loss(model.heads[t](trunk(x)).squeeze(-1), y[t]) for t in range(3)]
        gk.backward(losses, model, aggregator=METHOD)

    return backward


def one_forward(model: Model) -> Callable[[Tensor, Tensor], None]:
    """One compiled forward pass under all losses."""
    # Before anything is compiled, or a backward pass may overwrite what the next task's needs. The tag keeps such code,
    # from plain training, out of the cache on disk, whose keys do not tell it apart: gradients would be wrong.
    torch._functorch.config.donated_buffer = False
    torch.compiler.config.cache_key_tag = "no donated buffers"
    compiled = torch.compile(model, backend=BACKEND)

    def backward(x: Tensor, y: Tensor) -> None:
        gk.backward(task_losses(compiled(x), y), model, aggregator=METHOD, shared=model.trunk)

    return backward


def surgery_inside(model: Model) -> Callable[[Tensor, Tensor], None]:
    """All task gradients, and the surgery on them, in one compiled graph."""
    shared = [f"trunk.{name}" for name, _ in model.trunk.named_parameters()]

    @torch.compile(fullgraph=True, backend=BACKEND)
    def gradients(params: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        rows = jacrev(lambda p: torch.stack(task_losses(functional_call(model, p, (x,)), y)))(params)
        update = METHOD(torch.cat([rows[name].flatten(1) for name in shared], 1))
        pieces = update.split([params[name].numel() for name in shared])
        heads = {name: row.sum(0) for name, row in rows.items() if name not in shared}
        return heads | {name: g.view_as(params[name]) for name, g in zip(shared, pieces, strict=True)}

    def backward(x: Tensor, y: Tensor) -> None:
        for name, g in gradients({n: p.detach() for n, p in model.named_parameters()}, x, y).items():
            model.get_parameter(name).grad = g

    return backward


def main() -> None:
    """Each way on one batch."""
    torch.manual_seed(0)
    model = Model()
    norms = []
    for way in (task_by_task, one_forward, surgery_inside):
        backward = way(model)
        for x, y in batches(1):
            model.zero_grad()
            backward(x, y)
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    print(f"the norm of the combined gradient in three ways: {', '.join(f'{norm:.6f}' for norm in norms)}")


if __name__ == "__main__":
    main()
