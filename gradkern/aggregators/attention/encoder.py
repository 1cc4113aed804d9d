"""A small transformer that computes one score per task from sampled entries of the T task gradients."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Encoder(nn.Module):
    """Network: sampled entries of the rows → tokens + task embedding → self-attention over the tasks → scores.

    All scores are zero at first. The network is float64, which is cheap for matrices this small, and which neither
    autocast nor ``torch.set_float32_matmul_precision`` rounds. It is created on the CPU, whatever the default device.

    Args:
        subset: the greatest number of entries of a row.
        width: the width of the tokens.
        layers: the number of encoder layers.
    """

    def __init__(self, subset: int, width: int, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Linear(subset, width, dtype=torch.float64, device="cpu")
        self.embedding: nn.Parameter | None
        self.register_parameter("embedding", None)
        # One head: with an even number torch would take its inference path in eval mode, which rounds differently.
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, 1, 4 * width, dropout=0.0, batch_first=True, dtype=torch.float64, device="cpu"
                )
                for _ in range(layers)
            )
        )
        # No bias, because it would shift all scores alike. Zero, so that every task starts with the same score.
        self.score = nn.Linear(width, 1, bias=False, dtype=torch.float64, device="cpu")
        nn.init.zeros_(self.score.weight)

    @property
    def tasks(self) -> int | None:
        """The number of tasks, None before :meth:`begin`."""
        return None if self.embedding is None else self.embedding.shape[0]

    def begin(self, tasks: int | None) -> None:
        """Create the embedding of ``tasks`` tasks, the same one at every call; remove it if ``tasks`` is None."""
        if tasks is None:
            self.embedding = None
            return
        like = self.tokens.weight
        generator = torch.Generator("cpu").manual_seed(0)
        initial = torch.randn(tasks, like.shape[0], generator=generator, dtype=like.dtype, device="cpu")
        self.embedding = nn.Parameter(initial.to(like.device))

    def forward(self, X: Tensor) -> Tensor:
        """Compute scores (B, T) of finite entries (B, T, d). Only a row's direction matters; a zero row stays zero."""
        X = F.pad(X.to(self.tokens.weight.dtype), (0, self.tokens.in_features - X.shape[-1]))
        # Divide by the largest entry first, so that no square overflows or vanishes.
        peak = X.abs().amax(-1, keepdim=True)
        directions = F.normalize(X / torch.where(peak > 0, peak, 1.0), dim=-1)
        scores: Tensor = self.score(self.layers(self.tokens(directions) + self.embedding))
        return scores.squeeze(-1)
