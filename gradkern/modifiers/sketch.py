"""Random sketches of task gradients, whose dot products estimate the Gramian."""

from typing import Any

import torch
from torch import Tensor

from gradkern.arguments import boolean, integer, mapping
from gradkern.ops.philox import LARGEST_SEED, drawn_seed
from gradkern.ops.undo import PutBack


class Sketch:
    """Estimates the Gramian from each layer's gradient times a random matrix of signs; ``gramian=`` of a step takes it.

    A layer's gradient of task i, (q, p), becomes (q, columns): G_i S, where S (p, columns) holds ±1/√columns. Then
    ⟨G_i S, G_j S⟩ has the expectation ⟨G_i, G_j⟩, and a variance of at most 2 ‖G_i‖² ‖G_j‖² / columns (Woodruff 2014,
    Sketching as a Tool for Numerical Linear Algebra). Each step and each layer has signs of its own, so the errors of
    steps are independent. So make one sketch for a whole training: one that is made in each step begins anew, and with
    a seed has the same signs in all of them. All tasks and all ranks have the same signs. A layer is exact if that
    costs no more.

    Args:
        columns: the number of columns of S, 1 or more. More are more exact, and cost more.
        seed: from 0 to 2⁶⁴ - 1; None to draw one from torch's default generator.
        report: whether a step computes the exact Gramian too, for ``info.conflict_agreement``. It costs as much as a
            step without a sketch.
    """

    def __init__(self, columns: int = 64, seed: int | None = None, report: bool = False) -> None:
        self.columns = integer("columns", columns, 1, 2**20)
        self.seed = drawn_seed() if seed is None else integer("seed", seed, 0, LARGEST_SEED)
        self.report = boolean("report", report)
        self._step = 0

    def signs(self, layer: int, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return S (n, columns) of a layer in the current step.

        Args:
            layer: the layer's number.
            n: the number of rows.
            dtype: the dtype of S.
            device: the device of S.
        """
        generator = torch.Generator(device).manual_seed(_mixed(_mixed(_mixed(self.seed) + self._step) + layer))
        bits = torch.randint(2, (n, self.columns), generator=generator, device=device, dtype=torch.int8)
        return (2 * bits - 1).to(dtype) / self.columns**0.5

    def advance(self) -> None:
        """Move to the next step."""
        self._step += 1

    def state_dict(self) -> dict[str, int]:
        """Return seed and step, the current position in the stream of signs."""
        return {"seed": self.seed, "step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the position of a :meth:`state_dict`.

        Raises:
            TypeError, ValueError: ``state_dict`` has another form. Nothing has changed then.
        """
        mapping("state_dict", state_dict, ("seed", "step"))
        seed, step = integer("seed", state_dict["seed"], 0, LARGEST_SEED), integer("step", state_dict["step"], 0)
        self.seed, self._step = seed, step

    def snapshot(self) -> PutBack:
        """Return a function that puts the position in the stream of signs back as it is when this is called."""
        seed, step = self.seed, self._step

        def put_back() -> None:
            self.seed, self._step = seed, step

        return put_back

    def __repr__(self) -> str:
        report = ", report=True" if self.report else ""
        return f"Sketch(columns={self.columns}, seed={self.seed}{report})"


def _mixed(x: int) -> int:
    """Return a number of 64 bits that looks random, by the finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)
