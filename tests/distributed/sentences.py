"""A model of sentences for steps through activations, with a batch of which ranks have parts."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tests.distributed.jobs import T


class Words(nn.Module):
    """A model with an embedding, a layer without a bias, a scale that no layer holds, and heads."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 12, padding_idx=0)
        self.layer = nn.Linear(12, 8, bias=False)
        self.scale = nn.Parameter(torch.ones(8))
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(T))
        self.double()

    def losses(self, ids: Tensor, y: Tensor, at: Sequence[Callable[[Tensor], Tensor]]) -> list[Tensor]:
        """Return a loss for each task; ``at`` are functions above, within and below the shared part."""
        below, within, above = at
        h = above(self.scale * torch.tanh(self.layer(within(below(self.words(ids)))).mean(1)))
        return [(head(h).squeeze(-1) - target).square().mean() for head, target in zip(self.heads, y, strict=True)]


COLUMNS = 4
BATCH = 24
"""The number of examples, of 5 words each: more tokens than columns and words, so that one process sketches as well."""
PLAIN: list[Callable[[Tensor], Tensor]] = [torch.clone] * 3


def words(rank: int, ranks: int) -> tuple[Words, Tensor, Tensor]:
    """Return the model, and a rank's part of a batch; the whole batch with one rank."""
    torch.manual_seed(0)
    model = Words()
    ids, y = torch.randint(40, (BATCH, 5)), torch.randn(T, BATCH).double()
    own = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    return model, ids[own], y[:, own]
