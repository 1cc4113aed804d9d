"""The state of an optimizer's surgery, as checkpoints contain it."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from gradkern.aggregators import Aggregator
from gradkern.gradients.memory import Memory
from gradkern.modifiers.suppression import Suppression


@dataclass(frozen=True)
class Remembered:
    """The parts of an optimizer's surgery that have state, over ``params``; missing parts are None."""

    aggregator: Aggregator
    suppression: Suppression | None
    memory: Memory | None
    params: Sequence[Tensor]

    def state_dict(self) -> dict[str, Any]:
        """Return the method's name and state, the suppression's seed and step, and the gradients in ``memory``."""
        return {
            "method": type(self.aggregator).__name__,
            "state": dict(self.aggregator.state_dict()),
            "suppression": None if self.suppression is None else self.suppression.state_dict(),
            "memory": None if self.memory is None else self.memory.state_dict(self.params),
        }

    def load_state_dict(self, state_dict: Any) -> None:
        """Load a :meth:`state_dict`.

        Raises:
            ValueError: it belongs to another method, or does not fit. Parts of it may have been loaded then.
        """
        method = type(self.aggregator).__name__
        if not isinstance(state_dict, dict) or not {"method", "state"} <= set(state_dict):
            raise ValueError(f"state_dict['surgery'] must hold 'method' and 'state', got {state_dict!r:.200}")
        if state_dict["method"] != method:
            raise ValueError(
                f"state_dict is of a step with {state_dict['method']}, this optimizer's method is {method}"
            )
        suppression, memory = state_dict.get("suppression"), state_dict.get("memory")
        for name, saved, own in (("suppression", suppression, self.suppression), ("memory", memory, self.memory)):
            if saved is not None and own is None:
                raise ValueError(f"state_dict is of steps with {name}, but this optimizer has no {name}")
        self.aggregator.load_state_dict(state_dict["state"])
        if self.suppression is not None and suppression is not None:
            self.suppression.load_state_dict(suppression)
        if self.memory is not None and memory is not None:
            self.memory.load_state_dict(memory, self.params)

    @contextmanager
    def restored_if_it_raises(self) -> Iterator[Self]:
        """Yield itself for the block; if the block raises, restore the state from before."""
        before = self.state_dict()
        before["state"] = copy.deepcopy(before["state"])  # loading writes into the tensors that it refers to
        try:
            yield self
        except Exception:
            self.load_state_dict(before)
            raise
