"""The options of a step: the method and its modifiers."""

from dataclasses import dataclass, field

from gradkern.aggregators import Aggregator, Entrywise, GradAttention, Scalarization
from gradkern.aggregators.by_name import is_aggregator
from gradkern.arguments import instance
from gradkern.distributed.comm import ProcessGroup
from gradkern.gradients.memory import Memory
from gradkern.gradients.parameters import Groups, Params
from gradkern.modifiers.conflict_lr import ConflictLR
from gradkern.modifiers.suppression import Suppression
from gradkern.ops.undo import PutBack
from gradkern.step.way import Way


@dataclass(frozen=True)
class Options:
    """The options of a step, as :func:`gradkern.backward` and :class:`gradkern.SurgeryOptimizer` take them.

    Attributes:
        memory: lets absent tasks take part with their last gradients; None for no memory.
        process_group: the ranks that take the step together; see :func:`gradkern.distributed.comm.comm_of`.
        shard_optimizer: whether each rank has the optimizer's state of some rows of the parameters alone.
        way: how the step gets to the Gramian and to the update.
    """

    aggregator: Aggregator
    groups: Groups = "model"
    shared: Params | None = None
    suppression: Suppression | None = None
    conflict_lr: ConflictLR | None = None
    memory: Memory | None = None
    process_group: ProcessGroup | bool | None = None
    shard_optimizer: bool = False
    way: Way = field(default_factory=Way)

    def check(self) -> None:
        """Raise TypeError unless the method and each modifier are of their class."""
        is_aggregator("aggregator", self.aggregator)
        if self.suppression is not None:
            instance("suppression", self.suppression, Suppression, "a gradkern.Suppression or None")
        if self.conflict_lr is not None:
            instance("conflict_lr", self.conflict_lr, ConflictLR, "a gradkern.ConflictLR or None")

    def snapshot(self) -> list[PutBack]:
        """Return functions that put the state of the method, the masks, the memory and the sketch back as it is now."""
        stateful = (self.aggregator, self.suppression, self.memory, self.way.gramian)
        return [one.snapshot() for one in stateful if one is not None]

    @property
    def is_weighted_backward(self) -> bool:
        """Whether the step is torch's own backward pass of a weighted sum of losses."""
        return isinstance(self.aggregator, Scalarization) and self.suppression is None and self.conflict_lr is None

    @property
    def needs_whole_rows(self) -> bool:
        """Whether the step needs each entry of each row on every rank, for a state of the rows or of their entries."""
        method = self.aggregator
        of_rows = method.averages_rows or method.needs_second or isinstance(method, Entrywise)
        return self.memory is not None or of_rows

    @property
    def looks_at_positions(self) -> bool:
        """Whether the step looks at the positions of numbers in their parameters."""
        method = self.aggregator
        by_entries = isinstance(method, Entrywise) and method.looks_at_positions
        return by_entries or isinstance(method, GradAttention) or self.suppression is not None

    @property
    def adds_at_once(self) -> bool:
        """Whether the update of several micro-batches is the sum of their updates, so that each may go to ``.grad``."""
        method = self.aggregator
        plain = isinstance(method, Scalarization) and method.has_fixed_weights and not method.needs_gramian
        return plain and self.is_weighted_backward
