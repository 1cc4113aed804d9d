"""How good the predictions are: each task's measures, and the two overall scores of the reports."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from examples.minbert.batches import Batch
from examples.minbert.examples import CLASSES, TASKS
from examples.minbert.heads import MultiTask

Measured = dict[str, dict[str, float]]
"""By task: accuracy, precision, recall and majority of those that classify, pearson of the other; and loss."""


@dataclass(frozen=True)
class Scores:
    """Accuracy of sentiment and of paraphrases, and Pearson's correlation of similarity."""

    sst: float
    para: float
    sts: float

    @property
    def average(self) -> float:
        """The plain mean."""
        return (self.sst + self.para + self.sts) / 3

    @property
    def overall(self) -> float:
        """The mean with the correlation, from -1 to 1, brought to 0 to 1 as accuracies are."""
        return (self.sst + self.para + (self.sts + 1) / 2) / 3


def scores(measured: Measured) -> Scores:
    """Each task's measure that counts."""
    return Scores(measured["sst"]["accuracy"], measured["para"]["accuracy"], measured["sts"]["pearson"])


def classified(predicted: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    """Accuracy, precision and recall as means over the classes that occur in either, and majority.

    The last is the accuracy of whoever always says the most frequent class of ``labels``: what has to be beaten. A
    class that is never predicted has precision 0, one that is only predicted has recall 0, as scikit-learn has it.

    Args:
        predicted: (N,) of 0 … ``classes`` - 1, whatever dtype.
        labels: (N,), likewise.
        classes: how many there are.
    """
    counts = torch.bincount(labels.long() * classes + predicted.long(), minlength=classes**2)
    confusion = counts.reshape(classes, classes).double()  # a row for each label
    hits, labelled, named = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    occurring = labelled + named > 0
    return {
        "accuracy": float(hits.sum() / confusion.sum()),
        "precision": float((hits / named.clamp(min=1))[occurring].mean()),
        "recall": float((hits / labelled.clamp(min=1))[occurring].mean()),
        "majority": float(labelled.max() / labelled.sum()),
    }


def pearson(predicted: Tensor, labels: Tensor) -> float:
    """Pearson's correlation of (N,) and (N,); 0 where either is constant, or not finite.

    It is not defined there; a prediction that is the same for all tells as little of the labels as one without any
    correlation, and a NaN would spoil the mean of the tasks.
    """
    x, y = predicted.double(), labels.double()
    if bool(x.min() == x.max()) or bool(y.min() == y.max()):  # less their mean these are rounding errors, not zeros
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    r = float((x / x.norm()) @ (y / y.norm()))
    return min(1.0, max(-1.0, r)) if math.isfinite(r) else 0.0


def evaluate(model: MultiTask, loaders: Sequence[DataLoader[Batch]]) -> Measured:
    """Every task's measures and mean loss over all its examples, with dropout off; each module's mode is restored.

    A loss that is no mean over examples, 1 - Pearson, is that of the batches, by their sizes.

    Args:
        model: what predicts.
        loaders: one for each of ``TASKS``.
    """
    modes = [(module, module.training) for module in model.modules()]  # a frozen part has one of its own
    model.eval()
    try:
        with torch.no_grad():
            return {task: _of_task(model, t, loaders[t]) for t, task in enumerate(TASKS)}
    finally:
        for module, mode in modes:
            module.training = mode


def _of_task(model: MultiTask, task: int, loader: DataLoader[Batch]) -> dict[str, float]:
    predicted, labels, losses = [], [], []
    for batch in loader:
        found = model(task, batch)
        predicted.append(model.predicted(task, found))
        labels.append(batch.labels)
        losses.append(model.loss_of(task, found, batch.labels) * len(batch.labels))
    p, y = torch.cat(predicted).cpu(), torch.cat(labels).cpu()
    classes = CLASSES.get(TASKS[task])
    measures = {"pearson": pearson(p, y)} if classes is None else classified(p, y, classes)
    return measures | {"loss": float(torch.stack(losses).sum() / len(y))}
