"""The models: a trunk through which one batch passes once, and a head for each task on its features."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.step.model import BATCH, LENGTH, SIZES
from examples.minbert.bert import Config, Layer


class Passes(NamedTuple):
    """Features, (B, width), and losses of the tasks' one forward pass."""

    features: Tensor
    losses: list[Tensor]


class Shared(nn.Module):
    """A trunk with a head for each task, which predicts a number for each example of the same batch at every step.

    The tasks conflict: all heads have a part in common, so that they use the same features, and the targets of every
    second task are opposite, but for noise.

    Args:
        trunk: from a batch to features, (B, width).
        batch: what goes in.
        width: length of an example's features.
        T: number of tasks.
    """

    def __init__(self, trunk: nn.Module, batch: Tensor, width: int, T: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(T))
        in_common = nn.Linear(width, 1)
        with torch.no_grad():
            for head in self.heads:
                head.weight.add_(in_common.weight).div_(2**0.5)
        signs = torch.tensor([1.0, -1.0]).repeat(T)[:T, None]
        self.register_buffer("batch", batch)
        self.register_buffer("targets", signs * (1 + 2 * torch.randn(len(batch))) + torch.randn(T, len(batch)))

    def losses(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the loss of each task, whose head takes its own of the T features."""
        return [F.mse_loss(f(h)[:, 0], y) for f, h, y in zip(self.heads, features, self.targets, strict=True)]

    def forward(self) -> Passes:
        """Run the trunk once, and all heads on what comes out."""
        h = self.trunk(self.batch)
        return Passes(h, self.losses([h] * len(self.heads)))


def mlp(T: int, width: int = 1024, layers: int = 4, batch: int = 128) -> Shared:
    """Return square layers, each with a ReLU."""
    trunk = nn.Sequential(*(layer for _ in range(layers) for layer in (nn.Linear(width, width), nn.ReLU())))
    return Shared(trunk, torch.randn(batch, width), width, T)


class Encoder(nn.Module):
    """Embeddings and the layers of BERT, from tokens to the vector of each sentence's first token.

    Every parameter is used by a call of its own module, without which TorchJD's engine does not see it.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocabulary, config.hidden)
        self.positions = nn.Embedding(config.positions, config.hidden)
        self.norm = nn.LayerNorm(config.hidden, config.epsilon)
        self.layers = nn.ModuleList(Layer(config, dropout=0.0) for _ in range(config.layers))

    def forward(self, ids: Tensor) -> Tensor:
        """Return (B, hidden) for ids (B, L)."""
        x = self.norm(self.words(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device)))
        for layer in self.layers:
            x = layer(x, None)
        return x[:, 0]


def encoder(T: int, config: Config = SIZES["minilm"].config, layers: int = 3) -> Shared:
    """Return an encoder with the first ``layers`` of a configuration, by default three of MiniLM's six."""
    ids = torch.randint(config.vocabulary, (BATCH, LENGTH))
    return Shared(Encoder(replace(config, layers=layers)), ids, config.hidden, T)


class Block(nn.Module):
    """Two convolutions, and the input added to what comes out (He et al. 2016)."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.convolved = nn.Sequential(
            *(nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()),
            *(nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False), nn.BatchNorm2d(n_out)),
        )
        around = nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out)
        self.around = nn.Identity() if (n_in, stride) == (n_out, 1) else nn.Sequential(*around)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both, where it is positive."""
        return F.relu(self.convolved(x) + self.around(x))


def resnet(T: int, width: int = 64, side: int = 64, batch: int = 16) -> Shared:
    """Return ResNet-18, whose four stages have ``width`` channels, and twice, four and eight times as many."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    for n_in, n_out in zip((width, width, 2 * width, 4 * width), (width, 2 * width, 4 * width, 8 * width), strict=True):
        layers += [Block(n_in, n_out, n_out // n_in), Block(n_out, n_out, 1)]
    trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Shared(trunk, torch.randn(batch, 3, side, side), 8 * width, T)


class Named(NamedTuple):
    """A model's description, and the function that makes it for a number of tasks."""

    text: str
    make: Callable[[int], Shared]


MODELS = {
    "mlp": Named("MLP, 4 × 1024², 128 examples", mlp),
    "encoder": Named(f"encoder, 3 layers of 384, {BATCH} × {LENGTH} tokens", encoder),
    "resnet": Named("ResNet-18, 16 × 64²", resnet),
}
