"""The methods, which compute weights from a Gramian."""

from gradkern.aggregators import methods
from gradkern.aggregators.base import Aggregator, Solution
from gradkern.aggregators.entries.entrywise import Entries, Entrywise
from gradkern.aggregators.methods import *  # noqa: F403  # the methods' classes: a new one needs no edit here
from gradkern.aggregators.weightings.scalarization import Scalarization

__all__ = ["Aggregator", "Entries", "Entrywise", "Scalarization", "Solution"]
__all__ += methods.__all__
