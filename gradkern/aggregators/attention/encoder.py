"""A small transformer over task gradients: from the sampled entries of T rows to one score per task."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Encoder(nn.Module):
    """Rows of sampled entries → tokens + task embedding → self-attention over the tasks → scores, all zero at first.

    It is float64, which is cheap for matrices as small, and which neither autocast nor
    ``torch.set_float32_matmul_precision`` rounds. It is made on the CPU, whatever the ambient device.

    Args:
        subset: the greatest number of entries of a row.
        width: of the tokens.
        layers: how many encoder layers.
    """

    def __init__(self, subset: int, width: int, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Linear(subset, width, dtype=torch.float64, device="cpu")
        self.embedding: nn.Parameter | None = None
        # One head: with an even number torch would take its inference path, of other roundings, in eval mode.
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, 1, 4 * width, dropout=0.0, batch_first=True, dtype=torch.float64, device="cpu"
                )
                for _ in range(layers)
            )
        )
        # No bias: it would move all scores alike. Zero: every task starts with the same score.
        self.score = nn.Linear(width, 1, bias=False, dtype=torch.float64, device="cpu")
        nn.init.zeros_(self.score.weight)

    @property
    def tasks(self) -> int | None:
        """The number of tasks, None before :meth:`begin`."""
        return None if self.embedding is None else self.embedding.shape[0]

    def begin(self, tasks: int | None) -> None:
        """Start with a fresh embedding of so many tasks, always the same one; with None forget the number."""
        if tasks is None:
            self.embedding = None
            return
        like = self.tokens.weight
        generator = torch.Generator("cpu").manual_seed(0)
        drawn = torch.randn(tasks, like.shape[0], generator=generator, dtype=like.dtype, device="cpu")
        self.embedding = nn.Parameter(drawn.to(like.device))

    def forward(self, X: Tensor) -> Tensor:
        """(B, T, d) finite entries to (B, T) scores. A row counts by its direction alone; a zero row stays zero."""
        X = F.pad(X.to(self.tokens.weight.dtype), (0, self.tokens.in_features - X.shape[-1]))
        # First by the largest entry, so that no square overflows or vanishes.
        peak = X.abs().amax(-1, keepdim=True)
        directions = F.normalize(X / torch.where(peak > 0, peak, 1.0), dim=-1)
        scores: Tensor = self.score(self.layers(self.tokens(directions) + self.embedding))
        return scores.squeeze(-1)
