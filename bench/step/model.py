"""What a step trains: an encoder as BERT's with random weights, under three tasks with a head and a batch each."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.minbert.bert import Bert, Config

BATCH, LENGTH = 8, 64
OUTPUTS = (2, 5, 1)
"""Of each task's head: two tasks that classify, and one that predicts a number."""


class Size(NamedTuple):
    """Of an encoder."""

    name: str
    config: Config


SIZES = {
    "minilm": Size("MiniLM", Config(layers=6, hidden=384, heads=12, inner=1536)),
    "bert-base": Size("BERT-base", Config(layers=12, hidden=768, heads=12, inner=3072)),
}


class Passes(NamedTuple):
    """What comes of a forward pass for each task: the features, (B, hidden), and the losses."""

    features: list[Tensor]
    losses: list[Tensor]


class MultiTask(nn.Module):
    """The encoder, the heads, and the same batches at every step. No dropout, so that runs compare."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.encoder = Bert(config, dropout=0.0)
        self.heads = nn.ModuleList(nn.Linear(config.hidden, n) for n in OUTPUTS)
        self.batches = torch.randint(config.vocabulary, (len(OUTPUTS), BATCH, LENGTH))
        self.answers = [torch.randn(BATCH) if n == 1 else torch.randint(n, (BATCH,)) for n in OUTPUTS]

    def forward(self) -> Passes:
        """One pass through the encoder for each task."""
        features = [self.encoder(ids).pooled for ids in self.batches]
        found = [head(x) for head, x in zip(self.heads, features, strict=True)]
        return Passes(features, [_loss(y, answer) for y, answer in zip(found, self.answers, strict=True)])


def _loss(found: Tensor, answer: Tensor) -> Tensor:
    if answer.is_floating_point():
        return F.mse_loss(found.squeeze(-1), answer)
    return F.cross_entropy(found, answer)
