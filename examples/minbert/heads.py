"""The three tasks' heads and losses, by name, as the five reports have them; and the model that is trained."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.minbert.batches import Batch
from examples.minbert.bert import Bert, Encoded
from examples.minbert.examples import CLASSES, TASKS
from examples.minbert.tokens import together

MOST = 5
"""The similarity of sentences that mean the same."""


class Head(nn.Module):
    """What a task makes of the vectors, (B, H) each, of its one sentence or two: (B,) or, of classes, (B, classes)."""

    mean_pooled = False
    """Whether a sentence's vector is the mean of its tokens' in place of the encoder's pooled one."""

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)


class Linear(Head):
    """Dropout and a linear layer."""

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__(hidden, dropout)
        self.linear = nn.Linear(hidden, CLASSES["sst"])

    def forward(self, v: Tensor) -> Tensor:
        """(B, classes)."""
        return self.linear(self.dropout(v))


class TwoLayers(Linear):
    """A layer of as many numbers as the vector has comes before."""

    def __init__(self, hidden: int, dropout: float, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__(hidden, dropout)
        self.first, self.between = nn.Linear(hidden, hidden), between

    def forward(self, v: Tensor) -> Tensor:
        """(B, classes)."""
        return super().forward(self.between(self.first(self.dropout(v))))


class Concatenated(Head):
    """A linear layer of [v1, v2], whose bias begins as ``bias``."""

    def __init__(self, hidden: int, dropout: float, bias: float = 0.0) -> None:
        super().__init__(hidden, dropout)
        self.linear = nn.Linear(2 * hidden, 1)
        nn.init.constant_(self.linear.bias, bias)

    def forward(self, v1: Tensor, v2: Tensor) -> Tensor:
        """(B,)."""
        return self.linear(self.dropout(torch.cat((v1, v2), -1))).squeeze(-1)


class MeanPooled(Concatenated):
    """The same of the tokens' means."""

    mean_pooled = True


class Joint(Concatenated):
    """A linear layer of [v1 + v2, |v1 - v2|], to which it is one which sentence comes first."""

    def forward(self, v1: Tensor, v2: Tensor) -> Tensor:
        """(B,)."""
        return super().forward(v1 + v2, (v1 - v2).abs())


class Multiplicative(Head):
    """v1 (A + Aᵀ + I) v2ᵀ + b, to which it is one which sentence comes first; b begins as ``bias``."""

    def __init__(self, hidden: int, dropout: float, bias: float = 0.0) -> None:
        super().__init__(hidden, dropout)
        # The reports do not say how A begins. Here so that the form is attention's scaled product, v1 v2ᵀ / √H, at
        # first: of the size of logits and similarities, whatever H.
        self.A = nn.Parameter(torch.eye(hidden) * (hidden**-0.5 - 1) / 2)
        self.b = nn.Parameter(torch.tensor(bias))

    def forward(self, v1: Tensor, v2: Tensor) -> Tensor:
        """(B,)."""
        v1, v2 = self.dropout(v1), self.dropout(v2)
        return (F.linear(v1, self.A + self.A.T) * v2).sum(-1) + (v1 * v2).sum(-1) + self.b


class Cosine(Head):
    """5 ReLU(cos(v1, v2)), with no parameters. No dropout: equal sentences would then seem to differ in training."""

    def forward(self, v1: Tensor, v2: Tensor) -> Tensor:
        """(B,), from 0 to 5."""
        return MOST * F.relu(F.cosine_similarity(v1, v2))


class Sigmoid(Concatenated):
    """5 sigmoid of a linear layer of [v1, v2]."""

    def forward(self, v1: Tensor, v2: Tensor) -> Tensor:
        """(B,), from 0 to 5."""
        return MOST * torch.sigmoid(super().forward(v1, v2))


def pearson_loss(found: Tensor, labels: Tensor) -> Tensor:
    """1 - r of the batch: 1 where the labels are all one, or there is one example."""
    return 1 - F.cosine_similarity(found - found.mean(), labels - labels.mean(), dim=0)


HEADS: dict[str, dict[str, Callable[[int, float], Head]]] = {
    "sst": {
        "linear": Linear,
        "two-layer-tanh": partial(TwoLayers, between=torch.tanh),
        "two-layer-relu": partial(TwoLayers, between=F.relu),
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
        # From 0, which no pair is like, it takes dozens of steps to get among the labels.
        "joint": partial(Joint, bias=MOST / 2),
        "multiplicative": partial(Multiplicative, bias=MOST / 2),
    },
}
LOSSES: dict[str, dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "sst": {"cross-entropy": F.cross_entropy},
    "para": {"binary-cross-entropy": F.binary_cross_entropy_with_logits},
    "sts": {"mse": F.mse_loss, "pearson": pearson_loss},
}


class MultiTask(nn.Module):
    """An encoder under the three tasks, each with a head and a loss.

    With ``layer`` the sentences' vectors go through a linear layer and a ReLU that all tasks share: the report that
    freezes BERT trains it, and surgery needs something that tasks share.

    Args:
        encoder: BERT. Its dropout is the heads' too.
        heads: by task the name of a head, of ``HEADS``.
        losses: by task the name of a loss, of ``LOSSES``.
        layer: whether there is a shared layer between the encoder and the heads.
        mean_pooled: whether a sentence's vector is the mean of its tokens' for all heads, as for some weights.

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
        makers = [_named("heads", heads, HEADS, task) for task in TASKS]
        self.losses = [_named("losses", losses, LOSSES, task) for task in TASKS]
        self.encoder = encoder
        self.mean_pooled = mean_pooled
        self.layer = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU()) if layer else nn.Identity()
        self.heads = nn.ModuleList(make(hidden, p) for make in makers)

    def forward(self, task: int, batch: Batch) -> Tensor:
        """What the head says: logits of classes, (B, 5), or of a yes, (B,), or similarities, (B,).

        Args:
            task: its position in ``TASKS``.
            batch: of that task. Both sentences of a pair go through the encoder in one batch of 2B.
        """
        head = self.heads[task]
        tokens = together(batch.tokens)
        encoded = self.encoder(*tokens)
        v = self.layer(_mean(encoded, tokens.mask) if self.mean_pooled or head.mean_pooled else encoded.pooled)
        # A head takes no time, and half precision has three digits, in which similarities are soon all the same.
        with torch.autocast(v.device.type, enabled=False):
            return head(*v.to(torch.promote_types(v.dtype, torch.float32)).chunk(len(batch.tokens)))

    def loss_of(self, task: int, found: Tensor, labels: Tensor) -> Tensor:
        """The task's loss, a scalar, of what :meth:`forward` returned."""
        return self.losses[task](found, labels)

    def predicted(self, task: int, found: Tensor) -> Tensor:
        """What that means, (B,): the class, 0 or 1, or the similarity.

        A similarity is as the head says it. Only "cosine" and "sigmoid" keep it from 0 to 5, and training by
        "pearson" leaves its scale open.
        """
        if TASKS[task] == "sst":
            return found.argmax(-1)
        return (found > 0).long() if TASKS[task] == "para" else found

    def loss(self, task: int, batch: Batch) -> Tensor:
        """The task's loss, a scalar."""
        return self.loss_of(task, self(task, batch), batch.labels)

    def predict(self, task: int, batch: Batch) -> Tensor:
        """As :meth:`predicted`, of a batch."""
        return self.predicted(task, self(task, batch))

    def freeze_encoder(self, frozen: bool = True) -> None:
        """From now on training leaves the encoder as it is, or no more."""
        self.encoder.requires_grad_(not frozen)


def _named(
    argument: str, chosen: Mapping[str, str], known: Mapping[str, Mapping[str, Callable[..., Any]]], task: str
) -> Callable[..., Any]:
    name = chosen.get(task)
    if name not in known[task]:
        raise ValueError(f"{argument}[{task!r}] must be one of {', '.join(map(repr, known[task]))}, got {name!r}")
    return known[task][name]


def _mean(encoded: Encoded, mask: Tensor) -> Tensor:
    """(B, H): the mean of each sentence's tokens, [CLS] and [SEP] among them."""
    weight = mask.unsqueeze(-1).to(encoded.hidden.dtype)
    return (encoded.hidden * weight).sum(1) / weight.sum(1)
