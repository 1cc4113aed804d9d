"""The model that a step trains: a BERT encoder with random weights, and three tasks with a head and a batch each."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.minbert.bert import Bert, Config

BATCH, LENGTH = 8, 64
OUTPUTS = (2, 5, 1)
"""Outputs of each task's head: two tasks classify, and one predicts a number."""


class Size(NamedTuple):
    """Name and configuration of an encoder."""

    name: str
    config: Config


SIZES = {
    "tiny": Size("a tiny encoder", Config(layers=1, hidden=32, heads=2, inner=64, vocabulary=500)),
    "minilm": Size("MiniLM", Config(layers=6, hidden=384, heads=12, inner=1536)),
    "bert-base": Size("BERT-base", Config(layers=12, hidden=768, heads=12, inner=3072)),
}


class Passes(NamedTuple):
    """Features, (B, hidden), and loss of each task's forward pass."""

    features: list[Tensor]
    losses: list[Tensor]


class MultiTask(nn.Module):
    """The encoder, the heads, and the same batches at every step. There is no dropout, so that runs are comparable."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.encoder = Bert(config, dropout=0.0)
        self.heads = nn.ModuleList(nn.Linear(config.hidden, n) for n in OUTPUTS)
        self.batches = torch.randint(config.vocabulary, (len(OUTPUTS), BATCH, LENGTH))
        self.labels = [torch.randn(BATCH) if n == 1 else torch.randint(n, (BATCH,)) for n in OUTPUTS]

    def forward(self) -> Passes:
        """Run one pass through the encoder for each task."""
        features = [self.encoder(ids).pooled for ids in self.batches]
        outputs = [head(x) for head, x in zip(self.heads, features, strict=True)]
        return Passes(features, [_loss(y, label) for y, label in zip(outputs, self.labels, strict=True)])


def _loss(output: Tensor, label: Tensor) -> Tensor:
    if label.is_floating_point():
        return F.mse_loss(output.squeeze(-1), label)
    return F.cross_entropy(output, label)
