"""The heads and losses of the five reports, by task and name, and the multi-task model."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.minbert.batches import Batch
from examples.minbert.bert import Bert, Encoded
from examples.minbert.examples import CLASSES, TASKS
from examples.minbert.tokens import concatenate

MAX_SIMILARITY = 5
"""Similarity of sentences with the same meaning."""


class Head(nn.Module):
    """Base of the heads, which map the vectors, (B, H) each, of one or two sentences to (B,) or (B, classes)."""

    mean_pooled = False
    """Whether a sentence's vector is the mean over its tokens instead of the encoder's pooled vector."""

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)


class Linear(Head):
    """Head of dropout and a linear layer."""

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__(hidden, dropout)
        self.linear = nn.Linear(hidden, CLASSES["sst"])

    def forward(self, v: Tensor) -> Tensor:
        """Return logits, (B, classes)."""
        return self.linear(self.dropout(v))


class TwoLayers(Linear):
    """Head of a hidden layer as wide as the vector, an activation, and the linear layer."""

    def __init__(self, hidden: int, dropout: float, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__(hidden, dropout)
        self.first, self.activation = nn.Linear(hidden, hidden), activation

    def forward(self, v: Tensor) -> Tensor:
        """Return logits, (B, classes)."""
        return super().forward(self.activation(self.first(self.dropout(v))))


class Concatenated(Head):
    """Head of a linear layer on [v1, v2], whose initial bias is ``bias``."""

    def __init__(self, hidden: int, dropout: float, bias: float = 0.0) -> None:
        super().__init__(hidden, dropout)
        self.linear = nn.Linear(2 * hidden, 1)
        nn.init.constant_(self.linear.bias, bias)

    def forward(self, v1: Tensor, v2: Tensor) -> Tensor:
        """Return logits or similarities, (B,)."""
        return self.linear(self.dropout(torch.cat((v1, v2), -1))).squeeze(-1)


class MeanPooled(Concatenated):
    """The same head on the means of the tokens' vectors."""

    mean_pooled = True


class Joint(Concatenated):
    """Head of a linear layer on [v1 + v2, |v1 - v2|]. The order of the sentences does not matter."""

    def forward(self, v1: Tensor, v2: Tensor) -> Tensor:
        """Return logits or similarities, (B,)."""
        return super().forward(v1 + v2, (v1 - v2).abs())


class Multiplicative(Head):
    """Head v1 (A + Aᵀ + I) v2ᵀ + b, with initial b = ``bias``. The order of the sentences does not matter."""

    def __init__(self, hidden: int, dropout: float, bias: float = 0.0) -> None:
        super().__init__(hidden, dropout)
        # The reports do not give the initial A. This one makes the initial form attention's scaled product,
        # v1 v2ᵀ / √H, which has the size of logits and similarities for any H.
        self.A = nn.Parameter(torch.eye(hidden) * (hidden**-0.5 - 1) / 2)
        self.b = nn.Parameter(torch.tensor(bias))

    def forward(self, v1: Tensor, v2: Tensor) -> Tensor:
        """Return logits or similarities, (B,)."""
        v1, v2 = self.dropout(v1), self.dropout(v2)
        return (F.linear(v1, self.A + self.A.T) * v2).sum(-1) + (v1 * v2).sum(-1) + self.b


class Cosine(Head):
    """Head 5 ReLU(cos(v1, v2)), without parameters. Dropout would make equal sentences differ, so there is none."""

    def forward(self, v1: Tensor, v2: Tensor) -> Tensor:
        """Return similarities, (B,), from 0 to 5."""
        return MAX_SIMILARITY * F.relu(F.cosine_similarity(v1, v2))


class Sigmoid(Concatenated):
    """Head of 5 times the sigmoid of a linear layer on [v1, v2]."""

    def forward(self, v1: Tensor, v2: Tensor) -> Tensor:
        """Return similarities, (B,), from 0 to 5."""
        return MAX_SIMILARITY * torch.sigmoid(super().forward(v1, v2))


def pearson_loss(output: Tensor, labels: Tensor) -> Tensor:
    """Return 1 - r of the batch. It is 1 if all labels are equal or there is only one example."""
    return 1 - F.cosine_similarity(output - output.mean(), labels - labels.mean(), dim=0)


HEADS: dict[str, dict[str, Callable[[int, float], Head]]] = {
    "sst": {
        "linear": Linear,
        "two-layer-tanh": partial(TwoLayers, activation=torch.tanh),
        "two-layer-relu": partial(TwoLayers, activation=F.relu),
    },
    "para": {
        "concatenated": Concatenated,
        "mean-pooled": MeanPooled,
        "joint": Joint,
        "multiplicative": Multiplicative,
    },
    "sts": {
        "cosine": Cosine,
        "sigmoid": Sigmoid,
        # From an initial bias of 0 it takes dozens of steps to reach the range of the labels.
        "joint": partial(Joint, bias=MAX_SIMILARITY / 2),
        "multiplicative": partial(Multiplicative, bias=MAX_SIMILARITY / 2),
    },
}
LOSSES: dict[str, dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "sst": {"cross-entropy": F.cross_entropy},
    "para": {"binary-cross-entropy": F.binary_cross_entropy_with_logits},
    "sts": {"mse": F.mse_loss, "pearson": pearson_loss},
}


class MultiTask(nn.Module):
    """An encoder with a head and a loss for each of the three tasks.

    With ``layer``, the sentences' vectors go through a linear layer and a ReLU that all tasks share. The report that
    freezes BERT trains this layer, because surgery needs parameters that tasks share.

    Args:
        encoder: BERT encoder. The heads use the same dropout probability.
        heads: name of each task's head, from ``HEADS``.
        losses: name of each task's loss, from ``LOSSES``.
        layer: whether there is a shared layer between the encoder and the heads.
        mean_pooled: whether all heads take the mean over a sentence's tokens as its vector, as some weights require.

    Raises:
        ValueError: a task has no such head or loss.
    """

    def __init__(
        self,
        encoder: Bert,
        heads: Mapping[str, str],
        losses: Mapping[str, str],
        layer: bool = False,
        mean_pooled: bool = False,
    ) -> None:
        super().__init__()
        hidden, p = encoder.config.hidden, encoder.dropout.p
        makers = [_lookup("heads", heads, HEADS, task) for task in TASKS]
        self.losses = [_lookup("losses", losses, LOSSES, task) for task in TASKS]
        self.encoder = encoder
        self.mean_pooled = mean_pooled
        self.layer = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU()) if layer else nn.Identity()
        self.heads = nn.ModuleList(make(hidden, p) for make in makers)

    def forward(self, task: int, batch: Batch) -> Tensor:
        """Return the head's output: class logits, (B, 5), logits of a yes, (B,), or similarities, (B,).

        Args:
            task: position of the task in ``TASKS``.
            batch: batch of that task. Both sentences of a pair go through the encoder in one batch of 2B.
        """
        head = self.heads[task]
        tokens = concatenate(batch.tokens)
        encoded = self.encoder(*tokens)
        v = self.layer(_mean(encoded, tokens.mask) if self.mean_pooled or head.mean_pooled else encoded.pooled)
        # A head takes little time, and half precision has three digits, so few that similarities soon become equal.
        with torch.autocast(v.device.type, enabled=False):
            return head(*v.to(torch.promote_types(v.dtype, torch.float32)).chunk(len(batch.tokens)))

    def output_loss(self, task: int, output: Tensor, labels: Tensor) -> Tensor:
        """Return the task's loss, a scalar, from an output of :meth:`forward`."""
        return self.losses[task](output, labels)

    def prediction(self, task: int, output: Tensor) -> Tensor:
        """Return the prediction, (B,), from an output of :meth:`forward`: a class, 0 or 1, or a similarity.

        A similarity is the unchanged output. Only "cosine" and "sigmoid" keep it from 0 to 5, and the loss "pearson"
        does not determine its scale.
        """
        if TASKS[task] == "sst":
            return output.argmax(-1)
        return (output > 0).long() if TASKS[task] == "para" else output

    def loss(self, task: int, batch: Batch) -> Tensor:
        """Return the task's loss on a batch, a scalar."""
        return self.output_loss(task, self(task, batch), batch.labels)

    def predict(self, task: int, batch: Batch) -> Tensor:
        """Return the predictions for a batch, (B,)."""
        return self.prediction(task, self(task, batch))

    def freeze_encoder(self, frozen: bool = True) -> None:
        """Freeze the encoder, or unfreeze it."""
        self.encoder.requires_grad_(not frozen)


def _lookup(
    argument: str, names: Mapping[str, str], known: Mapping[str, Mapping[str, Callable[..., Any]]], task: str
) -> Callable[..., Any]:
    name = names.get(task)
    if name not in known[task]:
        raise ValueError(f"{argument}[{task!r}] must be one of {', '.join(map(repr, known[task]))}, got {name!r}")
    return known[task][name]


def _mean(encoded: Encoded, mask: Tensor) -> Tensor:
    """Return the mean over each sentence's tokens, including [CLS] and [SEP], (B, H)."""
    weight = mask.unsqueeze(-1).to(encoded.hidden.dtype)
    return (encoded.hidden * weight).sum(1) / weight.sum(1)
