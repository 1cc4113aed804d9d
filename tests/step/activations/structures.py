"""Ways in which losses, trunk and heads hang together, each as a small model of one forward pass."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional as F

from tests.step.activations.uses import Problem, below, headed, loss_of, matrix


def of_modules(trunk: nn.Module, x: Tensor, frozen: str | None = None) -> Problem:
    """Give a trunk three heads; the parameters whose names begin as ``frozen`` does are not trained."""
    for name, p in trunk.named_parameters():
        p.requires_grad_(frozen is None or not name.startswith(frozen))
    return headed(list(trunk.parameters()), torch.tanh(trunk(x)))


def layers(*widths: int) -> nn.Sequential:
    """Return linear layers with a tanh after each."""
    return nn.Sequential(*(module for a, b in pairwise(widths) for module in (nn.Linear(a, b), nn.Tanh())))


def deep() -> tuple[list[Tensor], Tensor]:
    """Return parameters and features of a trunk of two layers."""
    trunk = layers(4, 5, 4)
    return list(trunk.parameters()), trunk(torch.randn(6, 4))


def tied_to_an_output() -> Problem:
    words = nn.Embedding(9, 4)
    h = torch.tanh(words(torch.randint(9, (3, 5)))) @ matrix(4, 4)
    return headed([words.weight], torch.tanh(h @ words.weight.t()))


def tied_into_a_head() -> Problem:
    params, losses = headed(*deep())
    h = torch.tanh(torch.randn(6, 5) @ params[-1].new_ones(5, 5))
    assert losses[0] is not None
    losses[0] = losses[0] + loss_of(h @ params[0], 0)
    return Problem(params, losses)


def tied_heads(which: tuple[int, ...]) -> Problem:
    """Let some tasks have one head together."""
    params, h = deep()
    together = nn.Linear(4, 2)
    own = [nn.Linear(4, 2) for _ in range(3)]
    losses = [loss_of((together if t in which else own[t])(h), t) for t in range(3)]
    return Problem([*params, *(p for head in (together, *own) for p in head.parameters())], list(losses))


def some_absent(*absent: int) -> Problem:
    params, losses = headed(*deep())
    return Problem(params, [None if t in absent else loss for t, loss in enumerate(losses)])


def of_losses(change: Callable[[list[Tensor]], list[Tensor | None]]) -> Problem:
    """Compute losses from the three losses of heads."""
    params, losses = headed(*deep())
    return Problem(params, change([loss for loss in losses if loss is not None]))


def of_features(change: Callable[[Tensor, list[Tensor]], list[Tensor | None]]) -> Problem:
    """Compute losses from features and the three losses of heads."""
    params, h = deep()
    params, losses = headed(params, h)
    return Problem(params, change(h, [loss for loss in losses if loss is not None]))


def two_of_three() -> Problem:
    """Let a layer of its own lie between trunk and heads for two of the tasks."""
    params, h = deep()
    middle = nn.Linear(4, 4)
    heads = [matrix(4, 2) for _ in range(3)]
    between = torch.tanh(middle(h))
    losses = [loss_of((h if t == 1 else between) @ head, t) for t, head in enumerate(heads)]
    return Problem([*params, *middle.parameters(), *heads], list(losses))


def a_chain() -> Problem:
    """Let each task's features be computed from those of the one before."""
    params, h = deep()
    losses: list[Tensor | None] = []
    for t in range(3):
        layer, head = nn.Linear(4, 4), matrix(4, 2)
        h = torch.tanh(layer(h))
        losses.append(loss_of(h @ head, t))
        params = [*params, *layer.parameters(), head]
    return Problem(params, losses)


def two_trunks() -> Problem:
    """Let the first and the last task have a trunk, the last and the middle another one."""
    (left, a), (right, b) = deep(), deep()
    heads = [matrix(4, 2) for _ in range(3)]
    losses = [loss_of(h @ head, t) for t, (h, head) in enumerate(zip((a, b, a * b), heads, strict=True))]
    return Problem([*left, *right, *heads], list(losses))


def past_the_features() -> Problem:
    """Let two heads look at the first layer too."""
    W, h = below(torch.randn(6, 4))
    layer = nn.Linear(4, 4)
    top = torch.tanh(layer(h))
    heads = [matrix(4, 2) for _ in range(3)]
    losses = [loss_of((top + h if t else top) @ head, t) for t, head in enumerate(heads)]
    return Problem([W, *layer.parameters(), *heads], list(losses))


def a_pass_each() -> Problem:
    """Send another batch through the trunk for each task."""
    trunk = layers(4, 5, 4)
    heads = [matrix(4, 2) for _ in range(3)]
    losses = [loss_of(trunk(torch.randn(3 + t, 4)) @ head, t) for t, head in enumerate(heads)]
    return Problem([*trunk.parameters(), *heads], list(losses))


def unused() -> Problem:
    params, losses = headed(*deep())
    return Problem([matrix(3, 3), *params, matrix(2)], losses)


def constants_on_the_way() -> Problem:
    """Let no gradient come back through half of the trunk."""
    trunk, rest = layers(4, 5), layers(5, 4)
    h = trunk(torch.randn(6, 4))
    return headed([*trunk.parameters(), *rest.parameters()], rest(h.detach()))


def residual_images() -> Problem:
    """Let images pass convolutions, batch norms, a shortcut, and a pooling."""
    conv = [nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(3, 4, 1)]
    norm = [nn.BatchNorm2d(4), nn.BatchNorm2d(4)]
    x = torch.randn(2, 3, 5, 5)
    h = torch.relu(norm[0](conv[0](x)))
    h = torch.relu(norm[1](conv[1](h)) + conv[2](x))
    h = F.max_pool2d(h, 2).mean((2, 3))
    return headed([p for layer in (*conv, *norm) for p in layer.parameters()], h)


def sentences() -> Problem:
    """Let words and places go through attention with dropout."""
    words, places = nn.Embedding(9, 4, padding_idx=0), nn.Embedding(5, 4)
    encoder = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.3, batch_first=True)
    ids = torch.tensor([[3, 1, 1, 4, 0], [2, 7, 0, 0, 0]])
    h = encoder(words(ids) + places.weight, src_key_padding_mask=ids == 0)[:, 0]
    return headed([words.weight, places.weight, *encoder.parameters()], h)


def one_number() -> Problem:
    params, h = deep()
    scale = nn.Parameter(torch.tensor(1.5))
    return headed([*params, scale], torch.tanh(scale * h + scale))


def complex_numbers() -> Problem:
    W, b = nn.Parameter(torch.randn(4, 3, dtype=torch.complex128)), nn.Parameter(torch.randn(3, dtype=torch.complex128))
    V = nn.Parameter(torch.randn(3, 3, dtype=torch.complex128))
    first, h = below(torch.randn(6, 4))
    z = F.linear(h + 0j, W.t(), b)
    return headed([first, W, b, V], torch.tanh((z @ V.conj().t()).abs()))


def no_examples() -> Problem:
    trunk = layers(4, 5, 4)
    h = trunk(torch.randn(0, 4))
    heads = [matrix(4, 2) for _ in range(3)]
    return Problem([*trunk.parameters(), *heads], [(h @ head).sum() + head.sum() for head in heads])


def log_variances() -> Problem:
    """Weigh each loss by an entry of one parameter."""
    params, losses = headed(*deep())
    s = nn.Parameter(torch.randn(3))
    return Problem([*params, s], [torch.exp(-s[t]) * loss + s.sum() for t, loss in enumerate(losses)])


def outputs_as_losses() -> Problem:
    """Let no node lie between a layer and the losses."""
    W, h = below(torch.randn(3, 4))
    V = matrix(1, 4)
    return Problem([W, V], [F.linear(h[t : t + 1], V) for t in range(3)])


def nested() -> Problem:
    """Send examples of several lengths through a layer together."""
    layer = nn.Linear(4, 4)
    x = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged)
    return headed(list(layer.parameters()), torch.tanh(layer(x).values()))


def saved_by(hooks: saved_tensors_hooks) -> Problem:
    with hooks:
        params, h = deep()
    return headed(params, h)


def of_a_layout(trunk: nn.Module, x: Tensor, memory_format: torch.memory_format) -> Problem:
    trunk, x = trunk.to(memory_format=memory_format), x.to(memory_format=memory_format)
    return headed(list(trunk.parameters()), torch.tanh(trunk(x)).mean((2, 3)))


STRUCTURES: dict[str, Callable[[], Problem]] = {
    "a trunk and heads": lambda: headed(*deep()),
    "a layer twice": lambda: (
        lambda layer: of_modules(nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh()), torch.randn(6, 4))
    )(nn.Linear(4, 4)),
    "an embedding tied to an output": tied_to_an_output,
    "a trunk's weight in a head": tied_into_a_head,
    "one head of two tasks": lambda: tied_heads((0, 2)),
    "one head of all tasks": lambda: tied_heads((0, 1, 2)),
    "a frozen first layer": lambda: of_modules(layers(4, 5, 4), torch.randn(6, 4), frozen="0"),
    "a frozen last layer": lambda: of_modules(layers(4, 5, 4), torch.randn(6, 4), frozen="2"),
    "a frozen weight alone": lambda: of_modules(layers(4, 5, 4), torch.randn(6, 4), frozen="0.weight"),
    "frozen biases": lambda: of_modules(layers(4, 5, 4), torch.randn(6, 4), frozen="2.bias"),
    "a layer that two of three tasks reach": two_of_three,
    "features in a chain": a_chain,
    "two trunks": two_trunks,
    "heads that look past the features": past_the_features,
    "a forward pass for each task": a_pass_each,
    "the first task absent": lambda: some_absent(0),
    "the last task absent": lambda: some_absent(2),
    "a loss with another in it": lambda: of_losses(lambda ls: [ls[0], ls[1], 2 * ls[1] + ls[2]]),
    "a loss computed from another": lambda: of_losses(lambda ls: [ls[0], ls[1], (ls[1] - 3).square()]),
    "a loss computed from all": lambda: of_losses(lambda ls: [*ls[:2], ls[0] * ls[1] + ls[2]]),
    "a loss over another": lambda: of_losses(lambda ls: [ls[0], ls[1], ls[2] / ls[0].detach()]),
    "the same loss twice": lambda: of_losses(lambda ls: [ls[0], ls[1], ls[0]]),
    "opposite losses": lambda: of_losses(lambda ls: [ls[0], -ls[0], ls[2]]),
    "losses of one dimension": lambda: of_losses(lambda ls: [loss.reshape(1) for loss in ls]),
    "losses of a stacked tensor": lambda: of_losses(lambda ls: list(torch.stack(ls).unbind())),
    "a loss of the features themselves": lambda: of_features(lambda h, ls: [h.square().mean(), ls[1], ls[2]]),
    "losses of the features alone": lambda: of_features(lambda h, _: [h[:, t].square().mean() for t in range(3)]),
    "a loss that is an entry of the features": lambda: of_features(lambda h, ls: [h[0, 0], ls[1], ls[2]]),
    "a task that is zero": lambda: of_losses(lambda ls: [ls[0], 0 * ls[1], ls[2]]),
    "two tasks": lambda: of_losses(lambda ls: [*ls[:2]]),
    "four tasks": lambda: of_losses(lambda ls: [*ls, ls[0] + ls[1].sqrt()]),
    "twelve tasks": lambda: of_features(lambda h, ls: [(h[:, t % 4] - t).square().mean() for t in range(12)]),
    "parameters that no loss reaches": unused,
    "a detached trunk": constants_on_the_way,
    "one example": lambda: of_modules(layers(4, 5, 4), torch.randn(1, 4)),
    "no example": no_examples,
    "a parameter of no dimension": one_number,
    "complex parameters": complex_numbers,
    "residual images": residual_images,
    "images of channels last": lambda: of_a_layout(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 2)), torch.randn(2, 3, 5, 5), torch.channels_last
    ),
    "volumes of channels last": lambda: of_a_layout(
        nn.Sequential(nn.Conv3d(3, 4, 2), nn.Flatten(3)), torch.randn(2, 3, 3, 4, 3), torch.channels_last_3d
    ),
    "sentences": sentences,
    "log-variances in the losses": log_variances,
    "losses that are layers' outputs": outputs_as_losses,
    "nested sentences": nested,
    "tensors saved elsewhere": lambda: saved_by(save_on_cpu()),
    "tensors saved by hooks": lambda: saved_by(saved_tensors_hooks(lambda x: x.clone(), lambda x: x)),
    "a turned parameter": lambda: (
        lambda layer: of_modules(nn.Sequential(layer, nn.Tanh(), nn.Linear(5, 4)), torch.randn(6, 4))
    )(turned_linear()),
}


def turned_linear() -> nn.Linear:
    layer = nn.Linear(4, 5)
    layer.weight = nn.Parameter(torch.randn(4, 5).t())
    return layer
