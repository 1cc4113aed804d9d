"""Ways to use a parameter, each as a small model with three losses of one forward pass."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Problem(NamedTuple):
    """Parameters, and the losses of one forward pass; None for a task that is absent."""

    params: list[Tensor]
    losses: list[Tensor | None]


Trunk = Callable[[Tensor], Tensor]


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / math.sqrt(shape[-1]))


def loss_of(h: Tensor, t: int) -> Tensor:
    return (h - t).square().mean()


def headed(params: list[Tensor], h: Tensor) -> Problem:
    """Give each of three tasks a head on h."""
    heads = [matrix(h.shape[-1], 2) for _ in range(3)]
    return Problem([*params, *heads], [loss_of(h @ head, t) for t, head in enumerate(heads)])


def below(x: Tensor) -> tuple[nn.Parameter, Tensor]:
    """Return the weight of a first layer, and what comes out of it."""
    W = matrix(x.shape[-1], x.shape[-1])
    return W, torch.tanh(x @ W)


def of_one_weight(use: Callable[[Tensor, Tensor], Tensor], *shape: int, x: tuple[int, ...] = (5, 4)) -> Problem:
    """Use a weight of a shape on what comes out of a layer."""
    first, h = below(torch.randn(x))
    W = matrix(*shape)
    return headed([first, W], torch.tanh(use(h, W)))


class Double(torch.autograd.Function):
    """Twice a matrix product, with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(h, W)
        return 2 * h @ W

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        h, W = ctx.saved_tensors
        return 2 * g @ W.mT, 3 * h.mT @ g  # 3: seen only by whoever runs this


class Passed(torch.autograd.Function):
    """What goes in, with twice the gradient."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


def in_place(h: Tensor, W: Tensor) -> Tensor:
    out = h @ W
    out += 1
    out.sin_()
    out[:, 0] *= 2
    out.add_(h @ W)
    return out


def in_place_of_a_view(h: Tensor, W: Tensor) -> Tensor:
    out = torch.zeros(len(h), 8)
    out[:, :4] = h @ W
    out[:, 4:].copy_(F.linear(h, W))
    return out


def weighed_norm(h: Tensor, W: Tensor) -> Tensor:
    return h @ W + 0.1 * W.square().sum()


def attention(h: Tensor, W: Tensor) -> Tensor:
    q, k, v = (h @ W).chunk(3, -1)
    return F.scaled_dot_product_attention(q, k, v)


def a_layer_of_two_calls(h: Tensor, W: Tensor) -> Tensor:
    return torch.cat([F.linear(h[:2], W), F.linear(h[2:], W)])


def by_columns(h: Tensor, W: Tensor) -> Tensor:
    return torch.stack([h @ column for column in W.unbind(1)], -1)


def penalized(h: Tensor, W: Tensor) -> Tensor:
    """Use the gradient of the layer's output by its input."""
    out = torch.tanh(h @ W)
    (g,) = torch.autograd.grad(out.square().sum(), [h], create_graph=True)
    return torch.cat([out, g], -1)


IDS = torch.tensor([0, 2, 2, 1, 0])

USES: dict[str, Callable[[], Problem]] = {
    "F.linear": lambda: of_one_weight(F.linear, 3, 4),
    "F.linear with a bias": lambda: of_one_weight(lambda h, W: F.linear(h, W[:, :4], W[:, 4]), 3, 5),
    "F.linear of vectors": lambda: of_one_weight(lambda h, W: F.linear(h[0], W).unsqueeze(0), 3, 4),
    "x @ W": lambda: of_one_weight(lambda h, W: h @ W, 4, 3),
    "x @ W.t()": lambda: of_one_weight(lambda h, W: h @ W.t(), 3, 4),
    "x @ W.mT": lambda: of_one_weight(lambda h, W: h @ W.mT, 3, 4),
    "x @ W.T": lambda: of_one_weight(lambda h, W: h @ W.T, 3, 4),
    "x @ W.transpose": lambda: of_one_weight(lambda h, W: h @ W.transpose(-1, 0), 3, 4),
    "x @ W.T.mT": lambda: of_one_weight(lambda h, W: h @ W.T.mT, 4, 3),
    "a square W, and its transpose": lambda: of_one_weight(lambda h, W: (h @ W.T).sin() @ W, 4, 4),
    "x @ W.permute": lambda: of_one_weight(lambda h, W: h @ W.permute(1, 0), 3, 4),
    "x @ W.t().t()": lambda: of_one_weight(lambda h, W: h @ W.t().t(), 4, 3),
    "x @ W of sequences": lambda: of_one_weight(lambda h, W: h @ W, 4, 3, x=(2, 3, 4)),
    "x @ W.t() of sequences": lambda: of_one_weight(lambda h, W: h @ W.t(), 3, 4, x=(2, 3, 4)),
    "W @ x": lambda: of_one_weight(lambda h, W: (W @ h.t()).t(), 3, 4),
    "W.t() @ x": lambda: of_one_weight(lambda h, W: (W.t() @ h.t()).t(), 4, 3),
    "W @ v": lambda: of_one_weight(lambda h, W: (W @ h[0]).unsqueeze(0), 3, 4),
    "v @ W": lambda: of_one_weight(lambda h, W: (h[0] @ W).unsqueeze(0), 4, 3),
    "x @ v": lambda: of_one_weight(lambda h, v: (h @ v).unsqueeze(-1), 4),
    "x.t() @ W": lambda: of_one_weight(lambda h, W: h.t() @ W, 5, 3),
    "W @ W": lambda: of_one_weight(lambda h, W: h @ (W @ W), 4, 4),
    "W @ W.t()": lambda: of_one_weight(lambda h, W: h @ (W @ W.t()), 4, 3),
    "x @ x.t() @ W": lambda: of_one_weight(lambda h, W: h @ h.t() @ W, 5, 3),
    "torch.mm into a product": lambda: of_one_weight(lambda h, W: torch.mm(h, W) * torch.mm(h.flip(0), W), 4, 3),
    "einsum": lambda: of_one_weight(lambda h, W: torch.einsum("nlp,pq->nlq", h, W), 4, 3, x=(2, 3, 4)),
    "einsum of heads": lambda: of_one_weight(lambda h, W: torch.einsum("np,hpq->nhq", h, W).flatten(1), 2, 4, 3),
    "einsum with two sums": lambda: of_one_weight(lambda h, W: torch.einsum("nlp,lpq->nq", h, W), 3, 4, 2, x=(5, 3, 4)),
    "addmm": lambda: of_one_weight(lambda h, W: torch.addmm(h[:, :3], h, W), 4, 3),
    "addmm with alpha and beta": lambda: of_one_weight(
        lambda h, W: torch.addmm(h[:, :3], h, W, beta=0.5, alpha=2.0), 4, 3
    ),
    "addmm with a bias and beta": lambda: of_one_weight(
        lambda h, W: torch.addmm(W[4], h, W[:4], beta=0.5, alpha=2.0), 5, 3
    ),
    "a bias": lambda: of_one_weight(lambda h, b: F.linear(h, h[:3].detach(), b), 3),
    "a bias with beta": lambda: of_one_weight(lambda h, b: torch.addmm(b, h, h[:3].t(), beta=0.5), 3),
    "a bias of one number": lambda: of_one_weight(lambda h, b: torch.addmm(b, h, h[:3].t()), 1),
    "a bias of two dimensions": lambda: of_one_weight(lambda h, b: torch.addmm(b, h, h[:3].t()), 1, 3),
    "a bias of each example": lambda: of_one_weight(lambda h, b: torch.addmm(b, h, h[:3].t()), 5, 1),
    "a bias of two layers": lambda: of_one_weight(lambda h, b: F.linear(F.linear(h, h[:4], b).sin(), h[:4], b), 4),
    "a bias of a convolution": lambda: of_one_weight(
        lambda h, b: F.conv1d(h, h.detach()[:, :, :2].repeat(2, 1, 1)[:3], b), 3, x=(2, 4, 5)
    ),
    "addmm as the sum": lambda: of_one_weight(lambda h, W: torch.addmm(W, h, h[:4, :3], beta=3.0), 5, 3),
    "addmm as the first": lambda: of_one_weight(lambda h, W: torch.addmm(h[:3, :3], W, h[:4, :3], alpha=2.0), 3, 4),
    "addmv": lambda: of_one_weight(lambda h, W: torch.addmv(h[:3, 0], W, h[0], alpha=2.0).unsqueeze(0), 3, 4),
    "baddbmm": lambda: of_one_weight(
        lambda h, W: torch.baddbmm(h[..., :3], h, W.expand(2, 4, 3), alpha=2.0), 4, 3, x=(2, 3, 4)
    ),
    "bmm with expand": lambda: of_one_weight(lambda h, W: torch.bmm(h, W.expand(2, 4, 3)), 4, 3, x=(2, 3, 4)),
    "bmm with a weight each": lambda: of_one_weight(lambda h, W: torch.bmm(h, W), 2, 4, 3, x=(2, 3, 4)),
    "tensordot": lambda: of_one_weight(lambda h, W: torch.tensordot(h, W, ([1], [1])), 3, 4),
    "outer": lambda: of_one_weight(lambda h, v: torch.outer(h[:, 0], v), 3),
    "conv2d": lambda: of_one_weight(lambda h, W: F.conv2d(h, W, padding=1), 3, 4, 2, 2, x=(2, 4, 3, 4)),
    "conv2d of a turned weight": lambda: of_one_weight(
        lambda h, W: F.conv2d(h, W.transpose(0, 1)), 4, 3, 2, 2, x=(2, 4, 3, 4)
    ),
    "conv2d as the input": lambda: of_one_weight(lambda h, W: F.conv2d(W, h), 2, 4, 4, 5, x=(2, 4, 3, 4)),
    "conv2d two strides": lambda: of_one_weight(
        lambda h, W: F.conv2d(h, W, stride=(1, 2), dilation=(2, 1), padding=(2, 0)), 3, 4, 2, 3, x=(2, 4, 4, 5)
    ),
    "conv2d of two strides in a row": lambda: of_one_weight(
        lambda h, W: F.conv2d(F.conv2d(h, W, stride=2, padding=1).sin(), W, padding=(0, 1)), 4, 4, 2, 2, x=(2, 4, 4, 5)
    ),
    "conv2d and a transposed one": lambda: of_one_weight(
        lambda h, W: F.conv_transpose2d(F.conv2d(h, W).sin(), W), 3, 4, 2, 2, x=(2, 4, 3, 4)
    ),
    "conv1d in groups and whole": lambda: of_one_weight(
        lambda h, W: F.conv1d(h, W, groups=2) + F.conv1d(h[:, :2], W), 4, 2, 2, x=(2, 4, 5)
    ),
    "conv1d after unfold": lambda: of_one_weight(lambda h, W: h.unfold(1, 2, 1) @ W.t(), 3, 2),
    "a product of entries": lambda: of_one_weight(lambda h, v: h * v, 4),
    "a sum of entries": lambda: of_one_weight(lambda h, v: h + v, 5, 4),
    "a scalar": lambda: of_one_weight(lambda h, s: h * s, 1),
    "a sparse matrix's product": lambda: of_one_weight(
        lambda h, W: h + torch.sparse.mm(torch.eye(5).to_sparse(), W), 5, 4
    ),
    "an expanded input": lambda: of_one_weight(lambda h, W: F.linear(h[:1].expand(5, 4), W), 3, 4),
    "an input of another stride": lambda: of_one_weight(lambda h, W: F.linear(h[:, ::2], W), 3, 2),
    "a copy in complex numbers": lambda: of_one_weight(
        lambda h, W: torch.view_as_real((h + 1j * h.flip(0)) @ W.to(torch.complex128)).flatten(1), 4, 3
    ),
    "a real and an imaginary part": lambda: of_one_weight(
        lambda h, W: torch.view_as_real((h + 0j) @ torch.complex(W[:4], W[4:])).flatten(1), 8, 3
    ),
    "a table": lambda: of_one_weight(lambda h, W: h * F.embedding(IDS, W), 3, 4),
    "a slice as a table": lambda: of_one_weight(lambda h, W: h * F.embedding(IDS, W[1:]), 4, 4),
    "a turned table": lambda: of_one_weight(lambda h, W: h * F.embedding(IDS, W.t()), 4, 3),
    "a table with padding and without": lambda: of_one_weight(
        lambda h, W: h * F.embedding(IDS, W, padding_idx=0) + F.embedding(IDS.flip(0), W), 3, 4
    ),
    "a table for ids of two shapes": lambda: of_one_weight(
        lambda h, W: h * F.embedding(IDS, W) + F.embedding(torch.tensor([[1, 2], [1, 1]]), W).sum((0, 1)), 3, 4
    ),
    "a table scaled by frequency and not": lambda: of_one_weight(
        lambda h, W: h * F.embedding(IDS, W, scale_grad_by_freq=True) + F.embedding(IDS, W), 3, 4
    ),
    "a table for no id": lambda: of_one_weight(lambda h, W: torch.cat([h, F.embedding(IDS[:0], W)]), 3, 4),
    "a weight without numbers": lambda: of_one_weight(lambda h, W: torch.cat([h, h @ W], -1), 4, 0),
    "gather": lambda: of_one_weight(lambda h, W: h + W[torch.tensor([0, 0, 2, 1, 0])], 3, 4),
    "index_select": lambda: of_one_weight(lambda h, W: h + W.index_select(0, torch.tensor([0, 0, 2, 1, 0])), 3, 4),
    "cosine": lambda: of_one_weight(lambda h, W: F.linear(F.normalize(h), F.normalize(W)), 3, 4),
    "its square": lambda: of_one_weight(lambda h, W: h @ W.square(), 4, 3),
    "half of it": lambda: of_one_weight(lambda h, W: h @ (0.5 * W), 4, 3),
    "a slice of rows": lambda: of_one_weight(lambda h, W: F.linear(h, W[1:4]), 6, 4),
    "slices of rows and columns": lambda: of_one_weight(lambda h, W: F.linear(h, W[1:4, 2:6]), 6, 7),
    "all slices": lambda: of_one_weight(
        lambda h, W: torch.cat([F.linear(h, part) for part in W.split([2, 1, 3])], -1), 6, 4
    ),
    "a column each": lambda: of_one_weight(by_columns, 4, 3),
    "chunks of what comes out": lambda: of_one_weight(attention, 4, 12),
    "a view": lambda: of_one_weight(lambda h, W: h @ W.view(4, 3), 12),
    "a reshape": lambda: of_one_weight(lambda h, W: F.linear(h, W.reshape(3, 4)), 2, 6),
    "unsqueezed": lambda: of_one_weight(lambda h, W: (h.unsqueeze(1) @ W.unsqueeze(0)).squeeze(1), 4, 3),
    "detached elsewhere": lambda: of_one_weight(lambda h, W: h @ W + h @ W.detach(), 4, 3),
    "cloned": lambda: of_one_weight(lambda h, W: h @ W.clone(), 4, 3),
    "contiguous of a turned one": lambda: of_one_weight(lambda h, W: h @ W.t().contiguous(), 3, 4),
    "a custom function": lambda: of_one_weight(Double.apply, 4, 3),
    "a custom function above": lambda: of_one_weight(lambda h, W: Passed.apply(h @ W), 4, 3),
    "a custom function on the weight": lambda: of_one_weight(lambda h, W: h @ Passed.apply(W), 4, 3),
    "in-place operations": lambda: of_one_weight(in_place, 4, 4),
    "in-place operations on a view": lambda: of_one_weight(in_place_of_a_view, 4, 4),
    "a residual connection": lambda: of_one_weight(lambda h, W: h + torch.tanh(h @ W), 4, 4),
    "a dense connection": lambda: of_one_weight(lambda h, W: torch.cat([h, torch.tanh(h @ W)], -1), 4, 3),
    "a gate": lambda: of_one_weight(lambda h, W: h * torch.sigmoid(h @ W), 4, 4),
    "used on two inputs": lambda: of_one_weight(lambda h, W: h @ W + torch.tanh(h.flip(0)) @ W, 4, 3),
    "used twice in a row": lambda: of_one_weight(lambda h, W: torch.tanh(torch.tanh(h @ W) @ W), 4, 4),
    "used five times in a row": lambda: of_one_weight(
        lambda h, W: [h := torch.tanh(h @ W) for _ in range(5)][-1], 4, 4
    ),
    "used eleven hundred times": lambda: of_one_weight(lambda h, v: [h := h + 1e-3 * v for _ in range(1100)][-1], 4),
    "in the gradient of what comes out": lambda: of_one_weight(penalized, 4, 3),
    "used twice, once turned": lambda: of_one_weight(lambda h, W: torch.tanh(h @ W) @ W.t(), 4, 3),
    "used on two batches of other sizes": lambda: of_one_weight(a_layer_of_two_calls, 3, 4),
    "used in two ways": lambda: of_one_weight(weighed_norm, 4, 3),
    "used as a matrix and by entries": lambda: of_one_weight(lambda h, W: torch.tanh(h @ W) * W[0], 4, 3),
    "used as matrix and table": lambda: of_one_weight(
        lambda h, W: torch.tanh(h @ W) @ W.t() + F.embedding(torch.tensor([0, 1, 1, 3, 0]), W)[:, :1], 4, 4
    ),
    "used as matrix and filter": lambda: of_one_weight(
        lambda h, W: torch.tanh(h @ W.t()) + F.conv1d(h.unsqueeze(-1), W.unsqueeze(-1)).squeeze(-1), 3, 4
    ),
    "a regularizer of one loss": lambda: regularized(),
}
"""A weight, on what comes out of a layer, and three heads on it."""


def regularized() -> Problem:
    problem = of_one_weight(lambda h, W: h @ W, 4, 3)
    loss = problem.losses[1]
    assert loss is not None
    problem.losses[1] = loss + 0.1 * problem.params[1].square().sum()
    return problem
