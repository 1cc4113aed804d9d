"""Models that several tasks train through one forward pass: a convolutional net on digits, and three-task minBERT."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from examples.minbert.batches import Batch, loaders
from examples.minbert.bert import Bert, Config
from examples.minbert.examples import TASKS, Examples
from examples.minbert.heads import MultiTask
from examples.minbert.schemes import SCHEMES
from examples.minbert.tokens import Tokenizer, Tokens, concatenate
from gradkern.demo.model import MultiTaskNet
from gradkern.demo.training import Settings, make_data

T = TypeVar("T")
CPU = torch.device("cpu")
SCHEME = SCHEMES["unitary-scalarization"]
"""Heads, losses and batch sizes of minBERT."""
MAX_LENGTH = 32
"""Most tokens of a sentence."""
PAIRS = Settings(train_pairs=4096, test_pairs=1, batch_size=128)
"""Pairs of digits. More examples than a sketch has columns, as fewer make it exact for the linear layer."""


class Pass(NamedTuple):
    """Features, (B, width), and losses of one forward pass of all tasks."""

    features: Tensor
    losses: list[Tensor]


class Problem(NamedTuple):
    """A model and its forward passes.

    Attributes:
        model: the model.
        trunk: its part that all tasks share, and whose output the features are.
        passes: the forward pass of the next batch, with the model's present weights, each time it is asked.
        lr: learning rate of AdamW.
        every: the number of steps from one measurement to the next, about a second of them.
    """

    model: nn.Module
    trunk: nn.Module
    passes: Iterator[Pass]
    lr: float
    every: int


def digits(seed: int) -> Problem:
    """Return the net of ``gradkern demo`` on pairs of overlaid digits; the three tasks have the same images."""
    train, _ = make_data(seed, PAIRS)
    torch.manual_seed(seed)
    model = MultiTaskNet()

    def passes() -> Iterator[Pass]:
        while True:
            for batch in torch.randperm(len(train.images)).split(PAIRS.batch_size):
                h = model.trunk(train.images[batch])
                labels = [label[batch] for label in train.labels]
                yield Pass(h, [cross_entropy(head(h), y) for head, y in zip(model.heads, labels, strict=True)])

    return Problem(model, model.trunk, passes(), PAIRS.learning_rate, every=2)


def minbert(examples: Examples, seed: int) -> Problem:
    """Return an encoder of two layers with random weights; each of the three tasks has sentences of its own."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer.trained(chain.from_iterable(e.sentences for task in TASKS for e in examples[task]))
    config = Config(layers=2, hidden=128, heads=4, inner=512, vocabulary=tokenizer.vocabulary, positions=MAX_LENGTH)
    model = MultiTask(Bert(config, dropout=0.1), SCHEME.heads_by_task, SCHEME.losses)

    def encode(sentences: list[str]) -> Tokens:
        return tokenizer.encode(sentences, MAX_LENGTH)

    made = loaders(examples, encode, SCHEME.batch_sizes, seed, CPU)
    batches = zip(*map(_forever, made), strict=True)
    passes = (in_one_pass(model, of_tasks) for of_tasks in batches)
    return Problem(model, model.encoder, passes, lr=3e-4, every=10)


def in_one_pass(model: MultiTask, batches: Sequence[Batch]) -> Pass:
    """Send the sentences of all tasks through the encoder together, and each task's vectors through its head."""
    sentences = [tokens for batch in batches for tokens in batch.tokens]
    v = model.encoder(*concatenate(sentences)).pooled
    vectors = iter(v.split([len(tokens.ids) for tokens in sentences]))
    losses = []
    for task, batch in enumerate(batches):
        output = model.heads[task](*(next(vectors) for _ in batch.tokens))
        losses.append(model.output_loss(task, output, batch.labels))
    return Pass(v, losses)


def _forever(batches: Iterable[T]) -> Iterator[T]:
    while True:
        yield from batches
