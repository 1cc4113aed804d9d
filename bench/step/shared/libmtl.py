"""LibMTL's two backward passes of a weighted method, restated after its version 1.1.5, as naive as they are there.

The package itself needs old versions of others. Its ``AbsWeighting`` takes the tasks' gradients either by the shared
parameters (``rep_grad=False``) or by the features (``rep_grad=True``). The weights are the caller's.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.step.shared.models import Shared

VERSION = "1.1.5"
Weights = Callable[[Tensor], Tensor]


def by_parameters(model: Shared, weights: Weights) -> None:
    """Write ``.grad`` from the tasks' gradients by the trunk's parameters, each in a row of a matrix."""
    params = list(model.trunk.parameters())
    losses = model().losses
    grads = torch.zeros(len(losses), sum(p.numel() for p in params), device=losses[0].device)
    for t, loss in enumerate(losses):
        loss.backward(retain_graph=t + 1 < len(losses))
        grads[t] = _as_vector(params)
        model.trunk.zero_grad(set_to_none=False)  # as torch did by default when it was written
    update = torch.einsum("i, i... -> ...", weights(grads @ grads.T), grads)
    for p, g in zip(params, update.split([p.numel() for p in params]), strict=True):
        p.grad = g.contiguous().view(p.shape).clone()


def by_features(model: Shared, weights: Weights) -> None:
    """Write ``.grad`` by one backward pass of the trunk, with weights from the sums of the features' gradients."""
    h = model.trunk(model.batch)
    copies = [h.detach().clone().requires_grad_() for _ in model.heads]
    losses = model.losses(copies)
    grads = torch.zeros(len(losses), *h.shape, device=h.device)
    for t, (loss, copy) in enumerate(zip(losses, copies, strict=True)):
        loss.backward(retain_graph=t + 1 < len(losses))
        assert copy.grad is not None
        grads[t] = copy.grad.clone()
    sums = grads.reshape(len(losses), len(h), -1).sum(1)
    h.backward(torch.einsum("i, i... -> ...", weights(sums @ sums.T), grads))


def _as_vector(params: list[Tensor]) -> Tensor:
    """Return a copy of the gradients in one vector."""
    vector = torch.zeros(sum(p.numel() for p in params), device=params[0].device)
    for part, p in zip(vector.split([p.numel() for p in params]), params, strict=True):
        if p.grad is not None:
            part.copy_(p.grad.view(-1))
    return vector
