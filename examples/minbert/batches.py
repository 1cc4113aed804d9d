"""Examples as batches of tokens, in an order that can be resumed."""

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
        tokens: one, or two of a task of pairs: ``ids`` (B, L) int64 and ``mask`` (B, L) bool, L the longest of the B.
        labels: (B,), int64 classes (sst) or float32 (para: 0 or 1; sts: 0 to 5).
    """

    tokens: tuple[Tokens, ...]
    labels: Tensor


class Tokenized(Dataset[Batch]):
    """A task's examples, tokenized once, on the device they train on; whole batches are drawn from it."""

    def __init__(
        self,
        examples: Sequence[Example],
        encode: Callable[[list[str]], Tokens],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.labels = torch.tensor([example.label for example in examples], dtype=dtype, device=device)
        whole = [encode(list(sentences)) for sentences in zip(*(e.sentences for e in examples), strict=True)]
        self.lengths = [tokens.mask.sum(1).cpu() for tokens in whole]  # on the host, that no batch waits for the device
        self.tokens = [Tokens(tokens.ids.to(device), tokens.mask.to(device)) for tokens in whole]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, places: list[int]) -> Batch:
        rows = torch.tensor(places)
        of_sentences = []
        for tokens, lengths in zip(self.tokens, self.lengths, strict=True):
            longest = int(lengths[rows].max())
            of_sentences.append(Tokens(tokens.ids[rows, :longest], tokens.mask[rows, :longest]))
        return Batch(tuple(of_sentences), self.labels[rows])


def loaders(
    examples: Examples,
    encode: Callable[[list[str]], Tokens],
    batch_sizes: Sequence[int],
    seed: int | None,
    device: torch.device,
) -> list[DataLoader[Batch]]:
    """A loader of batches for each task, as ``TaskSampler`` takes them: a state of its resumes them to the bit.

    None of them draws from torch's default generator, so that looking at scores leaves dropout as it was.

    Args:
        examples: of each of ``TASKS``.
        encode: sentences to tokens, padded on the right to the longest.
        batch_sizes: of each task.
        seed: of the order, another in each pass; None for the order of ``examples``.
        device: where batches are.

    Raises:
        ValueError: not a batch size for each task.
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
