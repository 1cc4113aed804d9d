"""Quality of the predictions: each task's measures, and the two overall scores of the reports."""

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
"""Measures of each task: accuracy, precision, recall and majority if it classifies, else pearson; and loss."""


@dataclass(frozen=True)
class Scores:
    """Main score of each task: accuracy of sentiment and of paraphrases, Pearson's correlation of similarity."""

    sst: float
    para: float
    sts: float

    @property
    def average(self) -> float:
        """Mean of the three."""
        return (self.sst + self.para + self.sts) / 3

    @property
    def overall(self) -> float:
        """Mean of the three, with the correlation mapped from [-1, 1] to [0, 1], the range of accuracies."""
        return (self.sst + self.para + (self.sts + 1) / 2) / 3


def scores(measured: Measured) -> Scores:
    """Return each task's main score."""
    return Scores(measured["sst"]["accuracy"], measured["para"]["accuracy"], measured["sts"]["pearson"])


def classification_measures(predicted: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    """Return accuracy, macro-averaged precision and recall, and majority.

    The averages are over the classes that occur in labels or predictions. A class that is never predicted has precision
    0, and one that is only predicted has recall 0, as in scikit-learn. Majority is the accuracy of always predicting
    the most frequent label, the baseline to beat.

    Args:
        predicted: classes 0 … ``classes`` - 1, (N,), any dtype.
        labels: classes 0 … ``classes`` - 1, (N,), any dtype.
        classes: number of classes.
    """
    counts = torch.bincount(labels.long() * classes + predicted.long(), minlength=classes**2)
    confusion = counts.reshape(classes, classes).double()  # a row for each label
    hits, of_label, of_prediction = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    occurring = of_label + of_prediction > 0
    return {
        "accuracy": float(hits.sum() / confusion.sum()),
        "precision": float((hits / of_prediction.clamp(min=1))[occurring].mean()),
        "recall": float((hits / of_label.clamp(min=1))[occurring].mean()),
        "majority": float(of_label.max() / of_label.sum()),
    }


def pearson(predicted: Tensor, labels: Tensor) -> float:
    """Return Pearson's correlation of (N,) and (N,); 0 if either is constant or not finite.

    The correlation is undefined there. A constant prediction says as little about the labels as an uncorrelated one,
    and a NaN would spoil the mean over the tasks.
    """
    x, y = predicted.double(), labels.double()
    if bool(x.min() == x.max()) or bool(y.min() == y.max()):  # minus the mean, these are rounding errors, not zeros
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    r = float((x / x.norm()) @ (y / y.norm()))
    return min(1.0, max(-1.0, r)) if math.isfinite(r) else 0.0


def evaluate(model: MultiTask, loaders: Sequence[DataLoader[Batch]]) -> Measured:
    """Return each task's measures and mean loss over all its examples, with dropout off. Module modes are restored.

    The loss 1 - r is no mean over examples, so it is averaged over batches, weighted by their sizes.

    Args:
        model: model to evaluate.
        loaders: one for each of ``TASKS``.
    """
    modes = [(module, module.training) for module in model.modules()]  # a frozen part may have another mode
    model.eval()
    try:
        with torch.no_grad():
            return {task: _evaluate_task(model, t, loaders[t]) for t, task in enumerate(TASKS)}
    finally:
        for module, mode in modes:
            module.training = mode


def _evaluate_task(model: MultiTask, task: int, loader: DataLoader[Batch]) -> dict[str, float]:
    predicted, labels, losses = [], [], []
    for batch in loader:
        output = model(task, batch)
        predicted.append(model.prediction(task, output))
        labels.append(batch.labels)
        losses.append(model.output_loss(task, output, batch.labels) * len(batch.labels))
    p, y = torch.cat(predicted).cpu(), torch.cat(labels).cpu()
    classes = CLASSES.get(TASKS[task])
    measures = {"pearson": pearson(p, y)} if classes is None else classification_measures(p, y, classes)
    return measures | {"loss": float(torch.stack(losses).sum() / len(y))}
