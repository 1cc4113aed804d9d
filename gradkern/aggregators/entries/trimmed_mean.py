"""The trimmed mean (Yin et al. 2018): at each entry the largest and the smallest gradients are left out."""

from gradkern.aggregators.entries.entrywise import Entries, Entrywise
from gradkern.arguments import integer
from gradkern.ops import operators
from gradkern.ops.arguments import sample
from gradkern.ops.dtypes import arithmetic_dtype


class TrimmedMean(Entrywise):
    """The trimmed mean of Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates".

    At each entry the k largest and the k smallest gradients are left out, and the update is the mean of the others.
    Which tasks these are differs from entry to entry. With T = 2 k + 1 it is the median. Gradients that are left out
    are in no sum, so the largest ones round nothing off.

    A gradient that is not finite makes its entry NaN, so that gradient scalers see it. TorchJD's TrimmedMean leaves an
    infinite one out as the largest. With ``memory=True`` remembered gradients count among the T, but the update is the
    sum of those of present tasks that are left, divided by T - 2 k. The earlier task's of two equal ones counts as the
    larger.

    Args:
        k: the number of gradients left out at each end, 0 or more and below T / 2.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = integer("k", k, 0)

    def check_tasks(self, n_tasks: int) -> None:
        """Raise ValueError if nothing would be left of so many tasks."""
        if n_tasks <= 2 * self.k:
            raise ValueError(
                f"k must be below half of the number of tasks that have gradients, {n_tasks}, got {self.k}: of "
                f"{n_tasks} gradients nothing is left"
            )

    def combine_entries(self, entries: Entries) -> None:
        """Write the mean of what is left at each entry; see :meth:`Entrywise.combine_entries`."""
        present = entries.present
        weights = None if present is None else present.to(arithmetic_dtype(sample(entries.rows.grads).dtype))
        operators.trimmed_mean(entries.rows, self.k, weights, entries.out, entries.mask, entries.kept)

    def __repr__(self) -> str:
        return f"TrimmedMean(k={self.k})"
