"""torch.compile, in three ways.

A compiled function hides which output depends on which parameter: where there is no dependence, its backward pass
returns zeros. If one compiled graph contains all heads, every loss therefore seems to reach every head, and ``shared=``
must name the parameters under surgery.
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
METHOD = gk.PCGrad(order=[0, 1, 2])  # a fixed order makes the three ways comparable: inductor's random numbers differ


def task_by_task(model: Model) -> Callable[[Tensor, Tensor], None]:
    """Compile the trunk and run it once for each task: losses are callables, and each has its own graph."""
    trunk = torch.compile(model.trunk, backend=BACKEND)

    def backward(x: Tensor, y: Tensor) -> None:
        losses = [lambda t=t: nn.functional.mse_loss(model.heads[t](trunk(x)).squeeze(-1), y[t]) for t in range(3)]
        gk.backward(losses, model, aggregator=METHOD)

    return backward


def one_forward(model: Model) -> Callable[[Tensor, Tensor], None]:
    """Compile one forward pass for all losses."""
    # Set this before anything is compiled. Otherwise a backward pass may overwrite values that the next task's needs.
    # The cache on disk does not distinguish such code, compiled for ordinary training, by its keys. The tag does, and
    # without it the gradients would be wrong.
    torch._functorch.config.donated_buffer = False
    torch.compiler.config.cache_key_tag = "no donated buffers"
    compiled = torch.compile(model, backend=BACKEND)

    def backward(x: Tensor, y: Tensor) -> None:
        gk.backward(task_losses(compiled(x), y), model, aggregator=METHOD, shared=model.trunk)

    return backward


def surgery_inside(model: Model) -> Callable[[Tensor, Tensor], None]:
    """Compile all task gradients and their surgery into one graph."""
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
    """Run each way on one batch."""
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
