"""FAMO, fast adaptive multitask optimization (Liu et al. 2023)."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradkern.aggregators.base import OwnGrads
from gradkern.aggregators.scales import check_positive
from gradkern.aggregators.weightings.scalarization import Tasks
from gradkern.aggregators.weightings.state import StatefulWeighting
from gradkern.arguments import entries, integer, number, plain, shown

LEAST = 1e-8
"""The number added to each loss before its logarithm is taken, as the official code does."""
BETAS, EPS = (0.9, 0.999), 1e-8
"""Adam's, for the task logits."""


class FAMO(StatefulWeighting):
    """FAMO of Liu et al. 2023: it lowers the logarithms of all losses at about the same rate.

    Loss i has the weight (z_i / L_i) / Σ_j z_j / L_j with z the softmax of logits, one for each task. So the update is
    a multiple of the gradient of Σ z_i log L_i. After the optimizer's step, compute the losses of the same batch again,
    and call ``method.after(losses)``: Adam moves the logits along the change of the logarithms. Without that call the
    logits stay.

    All losses are computed before the backward pass. They must be above 0: another one raises ValueError on a CPU, and
    elsewhere gives NaN weights. Steps whose losses are not finite leave the logits as they are.

    Args:
        T: the number of tasks.
        lr: the learning rate of the logits, above 0.
        decay: the weight decay of the logits, Adam's: it is added to their gradient; 0 or more.
        report: as for :class:`Scalarization`.

    Attributes:
        table: (5, T) float64: the logits, Adam's two means, Adam's numbers of steps, and the losses of the last step,
            NaN where there is none.
    """

    needs_losses = True
    weighs_known_losses = True
    FIRST: ClassVar = {"logits": 0.0, "mean": 0.0, "square": 0.0, "steps": 0.0, "losses": torch.nan}

    def __init__(self, T: int, lr: float = 0.025, decay: float = 1e-3, report: bool = False) -> None:
        super().__init__(integer("T", T, least=1), report)
        self.lr = number("lr", lr, above=0)
        self.decay = number("decay", decay, least=0)

    def weigh(self, tasks: Tasks) -> Tensor:
        """Return the weights, which sum to 1 over the present tasks."""
        rows, losses = self._rows(tasks.count, tasks.device), tasks.known()
        check_positive(losses, "FAMO takes their logarithms")
        z = tasks.softmax(rows["logits"])
        w = z / torch.where(losses > 0, losses + LEAST, torch.nan)
        return w / tasks.among_present(w, 0.0).sum()

    def observe(self, tasks: Tasks) -> OwnGrads:
        """Remember the losses for :meth:`after`."""
        losses = tasks.known()
        self._move({"losses": losses}, tasks.finite() & (tasks.among_present(losses, 1.0) > 0).all())
        return ()

    @torch.no_grad()
    def after(self, losses: Sequence[Tensor | float | None] | Tensor) -> None:
        """Move the logits by the losses after the optimizer's step.

        Args:
            losses: T losses of the batch of the last step, as tensors of one element or numbers, or (T,) as one tensor;
                None for an absent task. A task counts if it was present in the last step too. They
                have no scale after ``update(scaler=)``, and the step's scale after ``backward`` of scaled losses.

        Raises:
            TypeError: ``losses`` is no sequence, or holds something else.
            ValueError: it has another number of entries or another shape, or on a CPU holds a loss that is not above 0.
                Nothing has changed then.
        """
        now = self._stacked(losses)
        rows = self._rows(len(now), now.device)
        check_positive(now, "FAMO takes their logarithms")
        fall = (rows["losses"] + LEAST).log() - (now + LEAST).log()
        there = ~rows["losses"].isnan() & ~now.isnan()
        z = Tasks(len(now), now.device, there).softmax(rows["logits"])
        fall = torch.where(there, fall, 0.0)
        self._adam(rows, z * (fall - (z * fall).sum()), there)

    def _adam(self, rows: dict[str, Tensor], grads: Tensor, there: Tensor) -> None:
        """Take a step of Adam with the logits of the tasks that are there."""
        grads = grads + self.decay * rows["logits"]
        steps = rows["steps"] + 1
        mean = BETAS[0] * rows["mean"] + (1 - BETAS[0]) * grads
        square = BETAS[1] * rows["square"] + (1 - BETAS[1]) * grads.square()
        root = (square / (1 - BETAS[1] ** steps)).sqrt() + EPS
        logits = rows["logits"] - self.lr * mean / (1 - BETAS[0] ** steps) / root
        new = {"logits": logits, "mean": mean, "square": square, "steps": steps}
        moved = {name: torch.where(there, row, rows[name]) for name, row in new.items()}
        self._move(moved, grads.isfinite().all() & there.any())

    def _stacked(self, losses: Any) -> Tensor:
        """Return the losses, (T,) float64, NaN for None; on their device, or the table's if they are host numbers."""
        shape = getattr(losses, "shape", None)
        if shape is not None and tuple(shape) != (self.T,):
            raise ValueError(f"losses must have shape ({self.T},), a number for each task, got shape {tuple(shape)}")
        given = list(losses) if isinstance(losses, Tensor) else entries("losses", losses, f"{self.T} losses in order")
        if len(given) != self.T:
            raise ValueError(f"losses must hold {self.T} entries, one for each task, got {len(given)}: {shown(losses)}")
        tensors = [x for x in given if isinstance(x, Tensor)]
        assert self.table is not None, "it is made with the method"
        device = tensors[0].device if tensors else self.table.device
        return torch.stack([self._number(i, x, device) for i, x in enumerate(given)])

    def _number(self, i: int, loss: object, device: torch.device) -> Tensor:
        if isinstance(loss, Tensor):
            if not loss.is_floating_point():
                raise TypeError(f"losses[{i}] must be floating, got {loss.dtype}")
            if loss.numel() != 1:
                raise ValueError(f"losses[{i}] must have one element, got shape {tuple(loss.shape)}")
            return loss.detach().reshape(()).to(device, torch.float64)
        x = torch.nan if loss is None else number(f"losses[{i}]", plain(loss), infinite=True)
        return torch.full((), x, dtype=torch.float64, device=device)

    def __repr__(self) -> str:
        return self._repr_of(f"T={self.T}", f"lr={self.lr}", f"decay={self.decay}")
