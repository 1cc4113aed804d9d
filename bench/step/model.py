"""What a step trains: an encoder as BERT's with random weights, under three tasks with a head and a batch each."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH, LENGTH = 8, 64
OUTPUTS = (2, 5, 1)
"""Of each task's head: two tasks that classify, and one that predicts a number."""


class Size(NamedTuple):
    """Of an encoder."""

    name: str
    layers: int
    hidden: int
    heads: int
    inner: int
    vocabulary: int = 30522
    positions: int = 512


SIZES = {
    "minilm": Size("MiniLM", layers=6, hidden=384, heads=12, inner=1536),
    "bert-base": Size("BERT-base", layers=12, hidden=768, heads=12, inner=3072),
}


class Layer(nn.Module):
    """One of the encoder's: attention, then a network for each token by itself. No dropout, so that runs compare."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.query, self.key, self.value, self.output = (nn.Linear(size.hidden, size.hidden) for _ in range(4))
        self.after_attention = nn.LayerNorm(size.hidden)
        self.up, self.down = nn.Linear(size.hidden, size.inner), nn.Linear(size.inner, size.hidden)
        self.after_all = nn.LayerNorm(size.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, hidden) of the same."""
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        x = self.after_attention(x + self.output(seen))
        return self.after_all(x + self.down(F.gelu(self.up(x))))


class Encoder(nn.Module):
    """The parameters are those of ``bench.shapes.bert``, in their order."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.words = nn.Embedding(size.vocabulary, size.hidden)
        self.positions = nn.Embedding(size.positions, size.hidden)
        self.sentences = nn.Embedding(2, size.hidden)
        self.norm = nn.LayerNorm(size.hidden)
        self.layers = nn.Sequential(*(Layer(size) for _ in range(size.layers)))
        self.pooler = nn.Linear(size.hidden, size.hidden)

    def forward(self, words: Tensor) -> Tensor:
        """(B, hidden), read off the first token, of (B, L) int64: two sentences of equal length."""
        place = torch.arange(words.shape[1], device=words.device)
        x = self.words(words) + self.positions(place) + self.sentences(2 * place // words.shape[1])
        return torch.tanh(self.pooler(self.layers(self.norm(x))[:, 0]))


class Passes(NamedTuple):
    """What comes of a forward pass for each task: the features, (B, hidden), and the losses."""

    features: list[Tensor]
    losses: list[Tensor]


class MultiTask(nn.Module):
    """The encoder, the heads, and the same batches at every step."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.encoder = Encoder(size)
        self.heads = nn.ModuleList(nn.Linear(size.hidden, n) for n in OUTPUTS)
        self.batches = torch.randint(size.vocabulary, (len(OUTPUTS), BATCH, LENGTH))
        self.answers = [torch.randn(BATCH) if n == 1 else torch.randint(n, (BATCH,)) for n in OUTPUTS]

    def forward(self) -> Passes:
        """One pass through the encoder for each task."""
        features = [self.encoder(words) for words in self.batches]
        found = [head(x) for head, x in zip(self.heads, features, strict=True)]
        return Passes(features, [_loss(y, answer) for y, answer in zip(found, self.answers, strict=True)])


def _loss(found: Tensor, answer: Tensor) -> Tensor:
    if answer.is_floating_point():
        return F.mse_loss(found.squeeze(-1), answer)
    return F.cross_entropy(found, answer)
