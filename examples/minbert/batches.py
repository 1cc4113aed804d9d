"""Batches of tokenized examples, in an order that can be resumed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from examples.minbert.examples import TASKS, Example, Examples
from examples.minbert.tokens import Tokens
from gradkern.sampling.stream import derived_seed


@dataclass(frozen=True)
class Batch:
    """B examples of one task.

    Attributes:
        tokens: one entry, or two for a task of pairs: ``ids`` (B, L) int64 and ``mask`` (B, L) bool, where L is the
            length of the longest sentence.
        labels: (B,), int64 classes (sst) or float32 (para: 0 or 1; sts: 0 to 5).
    """

    tokens: tuple[Tokens, ...]
    labels: Tensor


class Tokenized(Dataset[Batch]):
    """A task's examples, tokenized once, on the device they train on. It is indexed by whole batches."""

    def __init__(
        self,
        examples: Sequence[Example],
        encode: Callable[[list[str]], Tokens],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.labels = torch.tensor([example.label for example in examples], dtype=dtype, device=device)
        encoded = [encode(list(sentences)) for sentences in zip(*(e.sentences for e in examples), strict=True)]
        self.lengths = [tokens.mask.sum(1).cpu() for tokens in encoded]  # on the host: no batch waits for the device
        self.tokens = [Tokens(tokens.ids.to(device), tokens.mask.to(device)) for tokens in encoded]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> Batch:
        rows = torch.tensor(indices)
        batch_tokens = []
        for tokens, lengths in zip(self.tokens, self.lengths, strict=True):
            longest = int(lengths[rows].max())
            batch_tokens.append(Tokens(tokens.ids[rows, :longest], tokens.mask[rows, :longest]))
        return Batch(tuple(batch_tokens), self.labels[rows])


def loaders(
    examples: Examples,
    encode: Callable[[list[str]], Tokens],
    batch_sizes: Sequence[int],
    seed: int | None,
    device: torch.device,
) -> list[DataLoader[Batch]]:
    """Return a loader of batches for each task, for ``TaskSampler``, whose state resumes them to the bit.

    The loaders do not draw from torch's default generator, so that an evaluation does not change dropout.

    Args:
        examples: examples of each of ``TASKS``.
        encode: function from sentences to tokens, padded on the right to the longest.
        batch_sizes: batch size of each task.
        seed: seed of the order, which differs from pass to pass; None for the order of ``examples``.
        device: device of the batches.

    Raises:
        ValueError: the number of batch sizes is not the number of tasks.
    """
    if len(batch_sizes) != len(TASKS):
        raise ValueError(f"batch_sizes must be {len(TASKS)} numbers, one for each of {TASKS}; got {batch_sizes!r}")
    made = []
    for t, task in enumerate(TASKS):
        dataset = Tokenized(examples[task], encode, torch.int64 if task == "sst" else torch.float32, device)
        generator = torch.Generator().manual_seed(derived_seed(seed or 0, t))
        made.append(
            DataLoader(dataset, batch_sizes[t], shuffle=seed is not None, generator=generator, collate_fn=lambda b: b)
        )
    return made
