"""The second batch of a step: its task gradients give dot products with the first one's, and nothing else."""

from collections.abc import Sequence
from dataclasses import replace

from gradkern.aggregators import Aggregator
from gradkern.gradients.layouts import Row
from gradkern.gradients.losses import Loss, Losses, Source, losses_named
from gradkern.gradients.param_grads import laid_out, readable
from gradkern.gradients.parameters import Targets
from gradkern.step.rows import Rows
from gradkern.step.step_rows import StepRows

Second = Sequence[Loss] | None
"""The losses of the second batch, as those of the first; None without one."""


def check_wanted(second: Second, aggregator: Aggregator) -> None:
    """Raise ValueError unless the second batch is given exactly if the method needs it."""
    if second is None and aggregator.needs_second:
        raise ValueError(f"second must be the losses of another batch, which {aggregator!r} needs; got None")
    if second is not None and not aggregator.needs_second:
        raise ValueError(f"second must be None: {aggregator!r} does not look at another batch")


def opened(second: Second, source: Source, targets: Targets) -> Losses | None:
    """Return the second batch's losses, checked; ``source`` has been opened.

    Raises:
        TypeError, ValueError: they are not losses, or not one for each present task of ``source``.
    """
    if second is None:
        return None
    losses = Losses(second, retain_graph=False)
    with losses_named("second"):
        losses.open(targets.device)
    if isinstance(source, Losses):
        losses.differentiate = source.differentiate
    if len(losses.present) != len(source.present):
        raise ValueError(f"second must have {len(source.present)} entries as losses has, got {len(losses.present)}")
    for i, (given, present) in enumerate(zip(losses.present, source.present, strict=True)):
        if given != present:
            wanted = "a loss, as losses[{0}] is" if present else "None, as losses[{0}] is"
            raise ValueError(f"second[{i}] must be {wanted.format(i)}")
    return losses


def with_second(rows: StepRows, losses: Losses, targets: Targets) -> Rows:
    """Return the rows with the second batch's gradients beside them, by as many backward passes.

    Args:
        rows: the rows of the step.
        losses: the second batch's, opened.
        targets: the parameters of the rows.
    """
    assert isinstance(rows, Rows), "dot products are of tensors"
    second: list[Row] = [[None] * len(targets.tensors)] * rows.n_tasks
    with losses_named("second"):
        for i, row in losses.passes(targets.tensors):
            second[i] = [
                laid_out(g, p) if g is not None and g.is_sparse else g
                for g, p in zip(readable(row, targets.tensors, targets.layouts), targets.tensors, strict=True)
            ]
    return replace(rows, second=second)
