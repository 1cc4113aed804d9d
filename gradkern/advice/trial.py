"""One step that can be tried in several ways."""

from dataclasses import dataclass, replace
from textwrap import shorten

import torch
from torch import Tensor

from gradkern.advice.rehearsal import SinkOf, plain, rehearse
from gradkern.advice.ways import Candidate
from gradkern.gradients import graph
from gradkern.gradients.features import Features
from gradkern.gradients.losses import Loss, Losses, unreached
from gradkern.gradients.parameters import Params, Targets
from gradkern.gradients.sources import from_losses
from gradkern.step.options import Options
from gradkern.step.sinks import WeightedBackwardSink
from gradkern.step.weighted_pass import WeightedPassSink

LONGEST = 240
"""The number of characters of an error that are told as a reason."""


@dataclass(frozen=True)
class Trial:
    """One step, and what its ways have in common.

    Attributes:
        losses: one entry per task.
        features, params: as for :func:`gradkern.backward`; ``params`` can be read several times.
        targets: what is trained among ``params``.
        options: the method and its modifiers, for one rank.
        sink_of: chooses the sink of the step.
    """

    losses: list[Loss]
    features: Features | None
    params: Params
    targets: Targets
    options: Options
    sink_of: SinkOf

    def plain(self) -> None:
        """Run plain training's backward pass."""
        plain(Losses(self.losses, retain_graph=True), self.targets, together=self.features is not None)

    def rehearse(self, way: Candidate) -> None:
        """Go a way up to where the step would write."""
        if self.only_weighs:
            return self.plain()
        return rehearse(self._source(way), self.sink_of, self._options(way), self.params)

    def _source(self, way: Candidate) -> Losses:
        return from_losses(self.losses, self.features if way.takes_features else None, way.batched, retain_graph=True)

    def _options(self, way: Candidate) -> Options:
        return replace(self.options, way=way.way)

    def refusal(self, way: Candidate) -> str | None:
        """Return why the step cannot go a way; None if it has gone it.

        Raises:
            TypeError, ValueError: it cannot go any way.
        """
        is_rows = way.way.through == "rows" and not way.batched
        if way.takes_features and self.features is None:
            return "needs features=h, the output of the trunk that all tasks share"
        if not way.takes_features and self.features is not None and self.n_callables:
            return "callables that share features need features=h"
        if self.only_weighs:
            self._check()
            return None if is_rows else f"{self.options.aggregator!r} weighs losses, in one backward pass"
        try:
            self.rehearse(way)
        except torch.OutOfMemoryError:
            return "out of memory"
        except (TypeError, ValueError, RuntimeError) as error:
            if is_rows:
                raise
            return shorten(str(error), LONGEST, placeholder=" …")
        return None

    def _check(self) -> None:
        """Raise for losses whose weighted sum has no backward pass, which :meth:`rehearse` leaves out."""
        from_losses(self.losses, self.features, batched=False, retain_graph=True).open(self.targets.device)
        trained = set(self.targets.tensors)
        for i, loss in enumerate(self.losses):
            if isinstance(loss, Tensor):
                graph.refuse_reentrant(f"losses[{i}]", loss)
                if trained.isdisjoint(graph.leaves(loss)):
                    raise unreached(i)

    @property
    def only_weighs(self) -> bool:
        """Whether the step is torch's own backward pass of a weighted sum, and nothing else."""
        return self.options.is_weighted_backward and not self.options.aggregator.needs_gramian

    def ends_in_backward(self, way: Candidate) -> bool:
        """Return whether a way ends in torch's own backward pass of a weighted sum, which writes."""
        if self.only_weighs:
            return False
        sink = self.sink_of(self._source(way), self._options(way))
        if isinstance(sink, WeightedBackwardSink):
            return not self.n_callables  # it adds up the gradients of callables, which it has
        return isinstance(sink, WeightedPassSink)

    def passes(self, way: Candidate) -> tuple[int, int]:
        """Return the number of backward passes through trunk and heads on a way."""
        if self.only_weighs:
            return self.plain_passes, 1
        last = self.ends_in_backward(way)
        return way.trunk(self.n_tasks) + last, 1 + last

    @property
    def n_tasks(self) -> int:
        """The number of tasks that are present."""
        return sum(loss is not None for loss in self.losses)

    @property
    def n_callables(self) -> int:
        """The number of losses that are callables."""
        return sum(map(callable, self.losses))

    @property
    def plain_passes(self) -> int:
        """The number of backward passes of plain training: one for each callable with a graph of its own."""
        if self.features is not None:
            return 1
        return self.n_callables + (self.n_callables < self.n_tasks)
