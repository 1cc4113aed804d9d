"""BERT's encoder (Devlin et al. 2019)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ONLY = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
"""What a ``config.json`` may say of the kind of model."""
KEYS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "inner": "intermediate_size",
    "vocabulary": "vocab_size",
    "positions": "max_position_embeddings",
    "kinds": "type_vocab_size",
    "epsilon": "layer_norm_eps",
}
"""What it calls the sizes."""


@dataclass(frozen=True)
class Config:
    """Sizes of an encoder: of BERT-base where nothing is said.

    Attributes:
        layers: how many.
        hidden: H, numbers per token.
        heads: of attention in each layer.
        inner: width of each layer's feed-forward network.
        vocabulary: how many tokens there are.
        positions: the most tokens that a sentence may have.
        kinds: of segments that the weights know. Here all are of the first.
        epsilon: of the layer normalisations.
    """

    layers: int = 12
    hidden: int = 768
    heads: int = 12
    inner: int = 3072
    vocabulary: int = 30522
    positions: int = 512
    kinds: int = 2
    epsilon: float = 1e-12

    @classmethod
    def read(cls, file: Path) -> "Config":
        """From a ``config.json`` of Hugging Face's.

        Raises:
            ValueError: it is not of the one kind of model that is here, or leaves out a size.
        """
        found = json.loads(file.read_text())
        for name, only in ONLY.items():
            if found.get(name, only) != only:
                raise ValueError(f"{file}: {name} must be {only!r}, got {found[name]!r}")
        missing = [key for key in KEYS.values() if key not in found]
        if missing:
            raise ValueError(f"{file} has no {', no '.join(missing)}")
        return cls(**{name: found[key] for name, key in KEYS.items()})


class Encoded(NamedTuple):
    """What the encoder makes of B sentences of L tokens: a vector for each token, and one for each sentence.

    Attributes:
        hidden: (B, L, H). Where there is padding the numbers mean nothing.
        pooled: (B, H), read off the first token.
    """

    hidden: Tensor
    pooled: Tensor


class Layer(nn.Module):
    """Attention, then a network for each token by itself."""

    def __init__(self, config: Config, dropout: float) -> None:
        super().__init__()
        self.heads, self.p = config.heads, dropout
        self.query, self.key, self.value, self.output = (nn.Linear(config.hidden, config.hidden) for _ in range(4))
        self.after_attention = nn.LayerNorm(config.hidden, config.epsilon)
        self.up, self.down = nn.Linear(config.hidden, config.inner), nn.Linear(config.inner, config.hidden)
        self.after_all = nn.LayerNorm(config.hidden, config.epsilon)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:
        """(B, L, H) of the same; ``seen``, (B, 1, 1, L) bool, the tokens to attend to."""
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        found = F.scaled_dot_product_attention(q, k, v, seen, self.p if self.training else 0.0)
        x = self.after_attention(x + self.dropout(self.output(found.transpose(1, 2).flatten(-2))))
        return self.after_all(x + self.dropout(self.down(F.gelu(self.up(x)))))


class Bert(nn.Module):
    """The encoder with random weights, as torch's layers draw them. Its parameters are listed in BERT's order.

    Args:
        config: its sizes.
        dropout: the share of numbers that training drops: of embeddings, of attention and of what each layer adds.
    """

    def __init__(self, config: Config, dropout: float) -> None:
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocabulary, config.hidden)
        self.positions = nn.Embedding(config.positions, config.hidden)
        self.kinds = nn.Embedding(config.kinds, config.hidden)
        self.norm = nn.LayerNorm(config.hidden, config.epsilon)
        self.layers = nn.ModuleList(Layer(config, dropout) for _ in range(config.layers))
        self.pooler = nn.Linear(config.hidden, config.hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Encoded:
        """Encode sentences by themselves.

        Args:
            ids: (B, L) int64, each sentence from the first column on.
            mask: (B, L) bool, False where there is padding; None where there is none.

        Raises:
            ValueError: L is more than the model has positions.
        """
        length = ids.shape[1]
        if length > self.config.positions:
            raise ValueError(
                f"ids must have at most {self.config.positions} columns, the positions of the model, got {length}"
            )
        x = self.words(ids) + self.positions.weight[:length] + self.kinds.weight[0]
        x = self.dropout(self.norm(x))
        seen = None if mask is None else mask[:, None, None]
        for layer in self.layers:
            x = layer(x, seen)
        return Encoded(x, torch.tanh(self.pooler(x[:, 0])))
