"""A case for each kind of layer of torch.nn that has weights, in each way it is commonly made."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class Case(NamedTuple):
    """A layer and how it is called.

    Attributes:
        kind: its class in torch.nn.
        make: makes it.
        given: returns a batch of n examples; ids go to the layer as they are, numbers through a linear layer before.
        call: calls the layer.
    """

    kind: str
    make: Callable[[], nn.Module]
    given: Callable[[int], Tensor]
    call: Callable[[Any, Tensor], Tensor] = lambda layer, h: layer(h)


def shaped(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, *shape)


def ids(n: int) -> Tensor:
    """Return ids below 9, of which some repeat, 0 and 2 among them."""
    found = torch.randint(9, (n, 5))
    found[0] = torch.tensor([2, 2, 0, 7, 2])
    return found


def first(layer: Any, h: Tensor) -> Tensor:
    return layer(h)[0]


def both(layer: Any, h: Tensor) -> Tensor:
    """Return all numbers that an LSTM returns: its outputs, and its last states beside."""
    out, states = layer(h)
    return sum((s.sum() * 0.1 for s in (states if isinstance(states, tuple) else (states,))), out)


def in_steps(layer: Any, h: Tensor) -> Tensor:
    """Call a cell on each step in turn."""
    state = None
    for x in h.unbind(1):
        state = layer(x, state)
    return torch.cat(state, -1) if isinstance(state, tuple) else state


def turned(layer: Any, h: Tensor) -> Tensor:
    """Call a layer on an input whose numbers do not lie one after another."""
    return layer(h.transpose(0, 1))


def every_second(layer: Any, h: Tensor) -> Tensor:
    return layer(h[::2, ..., 1:])


def attended(layer: Any, h: Tensor) -> Tensor:
    return layer(h, h, h, need_weights=False)[0]


def attended_to_others(layer: Any, h: Tensor) -> Tensor:
    return layer(h, h.flip(0)[..., :3], h.flip(1)[..., 1:])[0]


def decoded(layer: Any, h: Tensor) -> Tensor:
    return layer(h, h.flip(0))


def bags(layer: Any, found: Tensor) -> Tensor:
    return layer(found.flatten(), torch.arange(0, found.numel(), found.shape[1]))


def weighted_bags(layer: Any, found: Tensor) -> Tensor:
    return layer(found, per_sample_weights=torch.linspace(-1, 1, found.numel()).view(found.shape))


def targets(h: Tensor, classes: int) -> Tensor:
    return torch.arange(len(h)) % classes


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "": {},
    " without bias": {"bias": False},
    " with stride": {"stride": 2},
    " with padding": {"padding": 1},
    " with dilation": {"dilation": 2, "padding": 2},
    " in groups": {"groups": 2},
    " in groups with all": {"groups": 2, "stride": 2, "padding": 2, "dilation": 2, "bias": False},
    " of each channel alone": {"groups": 4, "out_channels": 4},
    " padded to the same": {"padding": "same", "kernel_size": 3},
    " padded with reflections": {"padding": 1, "padding_mode": "reflect"},
    " padded around": {"padding": 2, "padding_mode": "circular"},
    " of one pixel": {"kernel_size": 1},
}
TRANSPOSED: dict[str, dict[str, Any]] = {
    "": {},
    " with all": {"stride": 2, "padding": 1, "output_padding": 1, "dilation": 2, "groups": 2, "bias": False},
}
RECURRENT: dict[str, tuple[dict[str, Any], Callable[[Any, Tensor], Tensor]]] = {
    "": ({}, first),
    " without bias": ({"bias": False}, both),
    " of two layers both ways": ({"num_layers": 2, "bidirectional": True, "batch_first": True}, both),
}
SIZES = {1: (6,), 2: (5, 4), 3: (3, 4, 3)}
"""Of the images, by their dimensions."""


def convolutions() -> dict[str, Case]:
    cases = {}
    for d, size in SIZES.items():
        for name, more in CONVOLUTIONS.items():
            options = {"in_channels": 4, "out_channels": 6, "kernel_size": 2 if d == 3 else 3, **more}
            cases[f"Conv{d}d{name}"] = Case(
                f"Conv{d}d", lambda d=d, options=options: getattr(nn, f"Conv{d}d")(**options), shaped(4, *size)
            )
        for name, more in TRANSPOSED.items():
            cases[f"ConvTranspose{d}d{name}"] = Case(
                f"ConvTranspose{d}d",
                lambda d=d, more=more: getattr(nn, f"ConvTranspose{d}d")(4, 6, 3, **more),
                shaped(4, *size),
            )
        batch = f"BatchNorm{d}d"
        cases[batch] = Case(batch, lambda batch=batch: getattr(nn, batch)(4), shaped(4, *size))
        cases[f"{batch} in evaluation"] = Case(
            batch, lambda batch=batch: getattr(nn, batch)(4).eval(), shaped(4, *size)
        )
        instance = f"InstanceNorm{d}d"
        cases[instance] = Case(
            instance, lambda instance=instance: getattr(nn, instance)(4, affine=True), shaped(4, *size)
        )
    cases["Conv2d of an image alone"] = Case("Conv2d", lambda: nn.Conv2d(4, 6, 3), lambda n: torch.randn(4, 5, 4))
    cases["Conv2d of one pixel of many channels"] = Case("Conv2d", lambda: nn.Conv2d(12, 10, 2), shaped(12, 2, 2))
    cases["Conv1d of a turned input"] = Case("Conv1d", lambda: nn.Conv1d(4, 6, 3), shaped(6, 4), lambda c, h: c(h.mT))
    return cases


def recurrent() -> dict[str, Case]:
    cases = {}
    for kind in ("RNN", "LSTM", "GRU"):
        for name, (options, call) in RECURRENT.items():
            cases[kind + name] = Case(
                kind, lambda kind=kind, options=options: getattr(nn, kind)(4, 3, **options), shaped(5, 4), call
            )
        cell = f"{kind}Cell"
        cases[cell] = Case(cell, lambda cell=cell: getattr(nn, cell)(4, 3), shaped(3, 4), in_steps)
        cases[f"{cell} without bias"] = Case(
            cell, lambda cell=cell: getattr(nn, cell)(4, 3, bias=False), shaped(3, 4), in_steps
        )
    cases["RNN of relu"] = Case("RNN", lambda: nn.RNN(4, 3, nonlinearity="relu"), shaped(5, 4), first)
    cases["LSTM with projections"] = Case("LSTM", lambda: nn.LSTM(4, 5, proj_size=2), shaped(5, 4), both)
    return cases


ENCODER: dict[str, Any] = {"d_model": 4, "nhead": 2, "dim_feedforward": 6, "dropout": 0.0}


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(**ENCODER, batch_first=True)


CASES: dict[str, Case] = {
    "Linear": Case("Linear", lambda: nn.Linear(4, 6), shaped(4)),
    "Linear without bias": Case("Linear", lambda: nn.Linear(4, 6, bias=False), shaped(4)),
    "Linear of sequences": Case("Linear", lambda: nn.Linear(4, 6), shaped(5, 4)),
    "Linear of sequences without bias": Case("Linear", lambda: nn.Linear(4, 6, bias=False), shaped(5, 4)),
    "Linear of four dimensions": Case("Linear", lambda: nn.Linear(4, 6), shaped(2, 3, 4)),
    "Linear of a turned input": Case("Linear", lambda: nn.Linear(4, 6), shaped(5, 4), turned),
    "Linear of a turned input without bias": Case("Linear", lambda: nn.Linear(4, 6, bias=False), shaped(5, 4), turned),
    "Linear of every second example": Case("Linear", lambda: nn.Linear(4, 6), shaped(5), every_second),
    "Linear of one example alone": Case("Linear", lambda: nn.Linear(4, 6), lambda n: torch.randn(4)),
    "Linear of one number": Case("Linear", lambda: nn.Linear(4, 1), shaped(4)),
    "Linear of many": Case("Linear", lambda: nn.Linear(40, 30), shaped(40)),
    "Linear of weight_norm": Case("Linear", lambda: parametrizations.weight_norm(nn.Linear(4, 6)), shaped(4)),
    "Linear of spectral_norm": Case("Linear", lambda: parametrizations.spectral_norm(nn.Linear(4, 6)), shaped(4)),
    "Linear of orthogonal": Case("Linear", lambda: parametrizations.orthogonal(nn.Linear(4, 6)), shaped(4)),
    "Conv2d of weight_norm": Case("Conv2d", lambda: parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), shaped(4, 5, 4)),
    "LazyLinear": Case("LazyLinear", lambda: nn.LazyLinear(6), shaped(4)),
    "LazyConv2d": Case("LazyConv2d", lambda: nn.LazyConv2d(6, 3), shaped(4, 5, 4)),
    "LazyConvTranspose1d": Case("LazyConvTranspose1d", lambda: nn.LazyConvTranspose1d(6, 3), shaped(4, 6)),
    "LazyBatchNorm1d": Case("LazyBatchNorm1d", lambda: nn.LazyBatchNorm1d(), shaped(4)),
    "Bilinear": Case("Bilinear", lambda: nn.Bilinear(4, 4, 3), shaped(4), lambda layer, h: layer(h, h.flip(0))),
    "Bilinear without bias": Case(
        "Bilinear", lambda: nn.Bilinear(4, 3, 3, bias=False), shaped(2, 4), lambda layer, h: layer(h, h[..., 1:].cos())
    ),
    **convolutions(),
    "Conv2d of channels last": Case(
        "Conv2d",
        lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last),
        shaped(4, 5, 4),
        lambda layer, h: layer(h.contiguous(memory_format=torch.channels_last)),
    ),
    "Embedding": Case("Embedding", lambda: nn.Embedding(9, 4), ids),
    "Embedding of more words than ids": Case("Embedding", lambda: nn.Embedding(300, 4), ids),
    "Embedding with padding": Case("Embedding", lambda: nn.Embedding(9, 4, padding_idx=2), ids),
    "Embedding with padding from the end": Case("Embedding", lambda: nn.Embedding(9, 4, padding_idx=-7), ids),
    "Embedding of max_norm": Case("Embedding", lambda: nn.Embedding(9, 4, max_norm=1.0), ids),
    "Embedding, sparse": Case("Embedding", lambda: nn.Embedding(9, 4, sparse=True, padding_idx=2), ids),
    "Embedding scaled by frequency": Case("Embedding", lambda: nn.Embedding(9, 4, scale_grad_by_freq=True), ids),
    "Embedding of int32": Case("Embedding", lambda: nn.Embedding(9, 4), lambda n: ids(n).int()),
    "Embedding of one id each": Case("Embedding", lambda: nn.Embedding(9, 4), lambda n: ids(n)[:, 0]),
    "Embedding and a layer on it": Case(
        "Embedding", lambda: nn.Sequential(nn.Embedding(9, 4), nn.Tanh(), nn.Linear(4, 3)), ids
    ),
    **{
        f"EmbeddingBag of {mode}": Case("EmbeddingBag", lambda mode=mode: nn.EmbeddingBag(9, 4, mode=mode), ids, bags)
        for mode in ("sum", "mean", "max")
    },
    "EmbeddingBag with weights": Case("EmbeddingBag", lambda: nn.EmbeddingBag(9, 4, mode="sum"), ids, weighted_bags),
    "EmbeddingBag, sparse": Case("EmbeddingBag", lambda: nn.EmbeddingBag(9, 4, sparse=True, padding_idx=2), ids),
    "GroupNorm": Case("GroupNorm", lambda: nn.GroupNorm(2, 4), shaped(4, 5)),
    "LayerNorm": Case("LayerNorm", lambda: nn.LayerNorm(4), shaped(4)),
    "LayerNorm of sequences": Case("LayerNorm", lambda: nn.LayerNorm(4), shaped(5, 4)),
    "LayerNorm of two dimensions": Case("LayerNorm", lambda: nn.LayerNorm((5, 4)), shaped(5, 4)),
    "LayerNorm without bias": Case("LayerNorm", lambda: nn.LayerNorm(4, bias=False), shaped(5, 4)),
    "RMSNorm": Case("RMSNorm", lambda: nn.RMSNorm(4), shaped(5, 4)),
    "PReLU": Case("PReLU", lambda: nn.PReLU(), shaped(4)),
    "PReLU of channels": Case("PReLU", lambda: nn.PReLU(4), shaped(4, 5)),
    **recurrent(),
    "MultiheadAttention": Case("MultiheadAttention", lambda: nn.MultiheadAttention(4, 2), shaped(5, 4), attended),
    "MultiheadAttention of others": Case(
        "MultiheadAttention",
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=3, batch_first=True, bias=False, add_bias_kv=False),
        shaped(5, 4),
        attended_to_others,
    ),
    "MultiheadAttention of a key more": Case(
        "MultiheadAttention", lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True), shaped(5, 4), attended
    ),
    "Transformer": Case(
        "Transformer",
        lambda: nn.Transformer(4, 2, 1, 1, dim_feedforward=6, dropout=0.0, batch_first=True),
        shaped(5, 4),
        decoded,
    ),
    "TransformerEncoderLayer": Case("TransformerEncoderLayer", encoder_layer, shaped(5, 4)),
    "TransformerEncoderLayer, norm first": Case(
        "TransformerEncoderLayer",
        lambda: nn.TransformerEncoderLayer(**ENCODER, activation="gelu", norm_first=True, bias=False),
        shaped(5, 4),
    ),
    "TransformerEncoder": Case("TransformerEncoder", lambda: nn.TransformerEncoder(encoder_layer(), 2), shaped(5, 4)),
    "TransformerDecoderLayer": Case(
        "TransformerDecoderLayer", lambda: nn.TransformerDecoderLayer(**ENCODER), shaped(5, 4), decoded
    ),
    "TransformerDecoder": Case(
        "TransformerDecoder",
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(**ENCODER), 2),
        shaped(5, 4),
        decoded,
    ),
    "AdaptiveLogSoftmaxWithLoss": Case(
        "AdaptiveLogSoftmaxWithLoss",
        lambda: nn.AdaptiveLogSoftmaxWithLoss(8, 9, [3, 6], div_value=2.0),
        shaped(8),
        lambda layer, h: layer(h, targets(h, 9)).output.unsqueeze(-1),
    ),
}
if hasattr(nn, "LinearCrossEntropyLoss"):  # of torch 2.13 and later
    CASES["LinearCrossEntropyLoss"] = Case(
        "LinearCrossEntropyLoss",
        lambda: nn.LinearCrossEntropyLoss(4, 5, bias=True, reduction="none"),
        shaped(4),
        lambda layer, h: layer(h, targets(h, 5)).unsqueeze(-1),
    )

NO_CASE = {
    "SyncBatchNorm": "runs on GPUs alone",
    "RNNBase": "is the base class of RNN, LSTM and GRU",
    "RNNCellBase": "is the base class of the cells",
    "FractionalMaxPool2d": "has no weights",
    "FractionalMaxPool3d": "has no weights",
    "Unflatten": "has no weights",
}
"""Kinds that may have weights, and why they have no case."""
