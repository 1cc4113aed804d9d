"""The results of one step's surgery, as tensors on the device. The host waits for them only when it reads them."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations

import torch
from torch import Tensor

from gradkern.arguments import entries, shown
from gradkern.ops.cosines import cosines

GROUPS = 256
"""The number of groups that have numbers of their own in :meth:`SurgeryInfo.scalars`."""

Tagged = tuple[str, list[str], Tensor | None]
"""A kind of number, the ends of its tags, and as many numbers."""


@dataclass(frozen=True, eq=False)
class SurgeryInfo:
    """The results of one step's surgery over T tasks.

    With groups other than "model" there are S Gramians, and most attributes have a leading dimension (S,). On several
    ranks the losses are means over the ranks, and all else is of the gradients' means, with the same bits on all ranks.

    Attributes:
        losses: (T,) float32 (float64 if a loss is), detached; NaN where a task was absent.
        gramian: (T, T) or (S, T, T), the dot products of the task gradients over the shared parameters, with
            ``through="features"`` those of the gradients by the features. Under ``Suppression(scope="all")`` they cover
            the kept entries only, under ``GradAttention(update="subset")`` the sampled ones. None for a method that
            weighs losses, unless it has ``report=True`` or needs the gradients' lengths, and for one that combines
            gradients entry by entry, unless ``ConflictLR`` needs it.
        weights: (T,) or (S, T), the weights of the task gradients in the update, in the Gramian's dtype, or in that of
            ``losses`` where there is none. None for a method that combines entry by entry.
        targets: (T, T) or (S, T, T) float64, the cosines that GradVac aims at, as they are after the step; None for
            other methods.
        attention: (T,) or (S, T), the weights that GradAttention gives to the tasks, summing to 1; None for other
            methods.
        kept: (), the share of the shared parameters' entries, or of the sampled ones, that suppression kept. It counts
            dense gradients only, and is None where there are none.
        step_scale: (), the factor κ by which ``ConflictLR`` scales the optimizer's step; None without ``ConflictLR``.
        total_norm: (), the gradient's norm over all parameters before ``update(max_norm=...)`` cut it; None without
            ``max_norm``.
        conflict_agreement: (), the share of task pairs for which the Gramian of ``Sketch(report=True)`` has a conflict
            where the exact one has, and none where that has none. NaN if no two gradients are nonzero. None without the
            report.
        groups: the names of the S groups, in the order of the dimension (S,): of parameters or modules, or what the
            function of names returned. Parameters without names have places, such as "params[0]". The module that is
            the model itself is "". None where there is no dimension (S,).
    """

    losses: Tensor
    gramian: Tensor | None
    weights: Tensor | None
    targets: Tensor | None = None
    attention: Tensor | None = None
    kept: Tensor | None = None
    step_scale: Tensor | None = None
    total_norm: Tensor | None = None
    conflict_agreement: Tensor | None = None
    groups: tuple[Hashable, ...] | None = None

    @cached_property
    def norms(self) -> Tensor | None:
        """The task gradients' Euclidean norms, (T,) or (S, T)."""
        return None if self.gramian is None else self.gramian.diagonal(dim1=-2, dim2=-1).sqrt()

    @cached_property
    def cosines(self) -> Tensor | None:
        """The cosine of every two task gradients, (T, T) or (S, T, T); 0 where either gradient is zero."""
        return None if self.gramian is None else cosines(self.gramian)

    @cached_property
    def conflicts(self) -> Tensor | None:
        """True for pairs of task gradients that conflict, cosine < 0: (T, T) or (S, T, T) bool."""
        return None if self.cosines is None else self.cosines < 0

    def scalars(self, tasks: Sequence[str] | None = None) -> dict[str, float]:
        """Return the step as named numbers, for TensorBoard, W&B or a line of JSON. The host waits for the device once.

        Args:
            tasks: T names; None for the tasks' positions, "0", "1", ….

        Returns:
            Numbers by tag. A number that is an attribute's entry is exact. i and j stand for names of tasks:

            - ``loss/i``; ``norm/i``; ``cosine/i-j``, once for each pair, in the order of tasks;
            - ``conflict``, the share of pairs with a cosine below 0, among pairs of gradients other than zero;
            - ``weight/i``; ``attention/i``; ``target/i-j``, of i's modified and j's original gradient, so both ways;
            - ``kept``, ``step_scale``, ``total_norm`` and ``conflict_agreement``;
            - with groups, for each group g of the first 256 of :attr:`groups`: ``conflict/g``, the share of its pairs
              with a cosine below 0, and ``mean_cosine/g``, the mean over its pairs. "" is called "(model)".

            With groups, the norms and cosines are the whole model's, from the sum of the Gramians. ``conflict`` counts
            the pairs of all groups. Weights, attention and targets are means over the groups that have a gradient.
            So T tasks have at most 4 T + 3 T (T - 1) / 2 + 5 numbers, and the groups at most 512 more.

            A tag is left out if the method has no such quantity, or if its number is not finite: the loss of an absent
            task, the cosines of a gradient that is zero, and numbers that a step that overflowed made infinite or NaN.

        Raises:
            TypeError: ``tasks`` is not a sequence.
            ValueError: it does not hold T names, or two pairs of them or two groups make the same tag.
        """
        names = _names(tasks, self.losses.shape[-1])
        of_tasks = [f"/{a}" for a in names]
        of_pairs = [f"/{a}-{b}" for a in names for b in names]
        M, targets = self.gramian, self.targets
        tagged: list[Tagged] = [("loss", of_tasks, self.losses)]
        if M is not None:
            whole = M if M.ndim == 2 else M.sum(0)
            of_groups = _pair_cosines(M)
            share = (of_groups < 0).sum().double() / of_groups.isfinite().sum()
            tagged += [
                ("norm", of_tasks, whole.diagonal().sqrt()),
                ("cosine", of_pairs, _pair_cosines(whole)),
                ("conflict", [""], share),
                *self._of_groups(of_groups),
            ]
        if targets is not None:
            own = torch.eye(len(names), dtype=torch.bool, device=targets.device)
            targets = targets.masked_fill(own, torch.nan)
        tagged += [
            ("weight", of_tasks, self._mean_of_groups(self.weights)),
            ("target", of_pairs, self._mean_of_groups(targets)),
            ("attention", of_tasks, self._mean_of_groups(self.attention)),
            ("kept", [""], self.kept),
            ("step_scale", [""], self.step_scale),
            ("total_norm", [""], self.total_norm),
            ("conflict_agreement", [""], self.conflict_agreement),
        ]
        tags = [kind + of for kind, each, values in tagged if values is not None for of in each]
        numbers = torch.cat([values.reshape(-1).double() for _, _, values in tagged if values is not None]).tolist()
        return {tag: number for tag, number in zip(tags, numbers, strict=True) if math.isfinite(number)}

    def _of_groups(self, cosines: Tensor) -> list[Tagged]:
        """Return the tagged numbers of each group. ``cosines`` (S, T, T) are NaN but for the pairs that count."""
        if self.groups is None:
            return []
        names = [str(group) or "(model)" for group in self.groups[:GROUPS]]
        if len(set(names)) < len(names):
            raise ValueError(f"groups must have names of their own as strings, got {self.groups!r:.200}")
        of_group, cosines = [f"/{name}" for name in names], cosines[: len(names)].double().flatten(1)
        counts = cosines.isfinite().sum(1)
        return [
            ("conflict", of_group, (cosines < 0).sum(1).double() / counts),
            ("mean_cosine", of_group, cosines.where(cosines.isfinite(), 0.0).sum(1) / counts),
        ]

    def _mean_of_groups(self, values: Tensor | None) -> Tensor | None:
        """Return the mean over the groups with a gradient other than zero. Heads, for one, have none under surgery."""
        if values is None or self.gramian is None or self.gramian.ndim == 2:
            return values
        of_group = (-1, *[1] * (values.ndim - 1))
        active = (self.gramian.diagonal(dim1=-2, dim2=-1) != 0).any(-1)
        return torch.where(active.view(of_group), values.double(), 0.0).sum(0) / active.sum()


def _pair_cosines(M: Tensor) -> Tensor:
    """Return the cosines of tasks i < j, (..., T, T); NaN in all other places, and where either gradient is zero."""
    nonzero = M.diagonal(dim1=-2, dim2=-1) != 0
    pairs = (nonzero.unsqueeze(-1) & nonzero.unsqueeze(-2)).triu(1)
    return torch.where(pairs, cosines(M), torch.nan)


def _names(tasks: Sequence[str] | None, n: int) -> list[str]:
    if tasks is None:
        return [str(t) for t in range(n)]
    names = entries("tasks", tasks, f"{n} names, one per task")
    if len(names) != n or not all(isinstance(name, str) for name in names):
        raise ValueError(f"tasks must be {n} names, one per task, got {shown(tasks)}")
    if len({f"{a}-{b}" for a, b in permutations(names, 2)}) < n * (n - 1):
        raise ValueError(f"tasks must make a tag of its own for every pair, as in 'cosine/a-b'; got {shown(tasks)}")
    return names
