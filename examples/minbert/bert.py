"""BERT's encoder (Devlin et al. 2019)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

REQUIRED = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
"""Values that ``config.json`` must have for these keys, if it has them."""
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
"""Keys of ``config.json`` for the sizes."""


@dataclass(frozen=True)
class Config:
    """Sizes of an encoder. The defaults are those of BERT-base.

    Attributes:
        layers: number of layers.
        hidden: H, length of a token's vector.
        heads: attention heads in each layer.
        inner: width of each layer's feed-forward network.
        vocabulary: number of tokens.
        positions: most tokens of a sentence.
        kinds: number of segment kinds in the weights. All sentences here are of the first kind.
        epsilon: epsilon of the layer normalisations.
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
        """Read a ``config.json`` of Hugging Face.

        Raises:
            ValueError: it describes another kind of model, or lacks a size.
        """
        config = json.loads(file.read_text())
        for name, required in REQUIRED.items():
            if config.get(name, required) != required:
                raise ValueError(f"{file}: {name} must be {required!r}, got {config[name]!r}")
        missing = [key for key in KEYS.values() if key not in config]
        if missing:
            raise ValueError(f"{file} has no {', no '.join(missing)}")
        return cls(**{name: config[key] for name, key in KEYS.items()})


class Encoded(NamedTuple):
    """Output of the encoder for B sentences of L tokens: a vector for each token, and one for each sentence.

    Attributes:
        hidden: token vectors, (B, L, H). The values at padding are meaningless.
        pooled: sentence vectors, (B, H), computed from the first token.
    """

    hidden: Tensor
    pooled: Tensor


class Layer(nn.Module):
    """A layer of the encoder: attention, then a feed-forward network on each token."""

    def __init__(self, config: Config, dropout: float) -> None:
        super().__init__()
        self.heads, self.p = config.heads, dropout
        self.query, self.key, self.value, self.output = (nn.Linear(config.hidden, config.hidden) for _ in range(4))
        self.after_attention = nn.LayerNorm(config.hidden, config.epsilon)
        self.up, self.down = nn.Linear(config.hidden, config.inner), nn.Linear(config.inner, config.hidden)
        self.after_all = nn.LayerNorm(config.hidden, config.epsilon)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return the next vectors, (B, L, H); ``mask``, (B, 1, 1, L) bool, is True at the tokens to attend to."""
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(q, k, v, mask, self.p if self.training else 0.0)
        x = self.after_attention(x + self.dropout(self.output(attended.transpose(1, 2).flatten(-2))))
        return self.after_all(x + self.dropout(self.down(F.gelu(self.up(x)))))


class Bert(nn.Module):
    """BERT's encoder, with the random initial weights of torch's layers. Its parameters are listed in BERT's order.

    Args:
        config: sizes of the encoder.
        dropout: dropout probability for embeddings, attention weights and the output of each sublayer.
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
        """Encode each sentence.

        Args:
            ids: tokens, (B, L) int64; each sentence starts in the first column.
            mask: (B, L) bool, False at padding; None if there is no padding.

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
        attention_mask = None if mask is None else mask[:, None, None]
        for layer in self.layers:
            x = layer(x, attention_mask)
        return Encoded(x, torch.tanh(self.pooler(x[:, 0])))
