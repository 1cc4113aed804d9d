"""A sampler that draws steps from one data loader per task, and chooses which tasks train in each step."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gradkern.arguments import integer
from gradkern.sampling.arguments import checked_lengths, checked_sizes, dataset_sizes
from gradkern.sampling.stream import Stream, derived_seed, set_states, states

SCHEMES = ("joint", "round_robin", "random", "proportional", "annealed")
BY_SIZE = ("proportional", "annealed")


class TaskSampler:
    """Chooses the tasks of each step and draws their batches.

    One iteration over it is one epoch, and ``len`` is the number of steps in an epoch::

        sampler = TaskSampler(loaders, "annealed", epochs=10)
        for epoch in range(sampler.epoch, 10):
            for batches in sampler:  # one entry per task: its batch, or None where the task is absent
                losses = [None if b is None else loss(t, b) for t, b in enumerate(batches)]
                opt.zero_grad()
                gk.backward(losses, model, aggregator=gk.PCGrad())
                opt.step()

    The schemes, for T loaders of L_i batches and N_i examples:

    ================  ===================================  ===============
    scheme            tasks of a step                      steps per epoch
    ================  ===================================  ===============
    "joint"           all                                  max_i L_i
    "round_robin"     one, in turn: 0, 1, …, T-1, 0, …     T max_i L_i
    "random"          one, p_i = 1/T                       Σ_i L_i
    "proportional"    one, p_i ∝ N_i                       Σ_i L_i
    "annealed"        one, p_i ∝ N_i^α in epoch e of E,    Σ_i L_i
                      α = 1 - 0.8 (e-1)/(E-1); 1 if E = 1
    ================  ===================================  ===============

    A loader that runs out begins another pass, and shuffles again if it shuffles. A pass continues in the next epoch,
    and so do round robin's turns. So no example comes up more often because it stands first.

    **Random numbers.** An epoch's tasks are a function of (seed, epoch). In its n-th pass a loader may take numbers
    from torch's default CPU generator, for shuffling or in the dataset. They come from a stream seeded by
    (seed, task, n), and the default generator itself does not change. A generator that belongs to a loader or to its
    sampler is used as it is; ``seed`` does not affect it.

    **Resuming.** :meth:`state_dict` may be taken anywhere, inside the loop too. A sampler over new loaders that loads
    it continues the epoch with exactly the batches that would have come. If the state was taken in the last step,
    there are none, and the epoch ends. ``persistent_workers`` must stay the same. The number of workers may change,
    unless loaders have generators of their own, from which workers draw ahead of time.

    Three kinds of random numbers are not repeated: those of NumPy and of Python's ``random``; those that a dataset
    draws in persistent workers; and those that loaders with a common generator draw from it after the start of a pass
    (torch shuffles at the start).

    Sources: "Rhapsody on a Theme of Gradient Surgery", §3.2; annealed: Stickland & Murray 2019, "BERT and PALs".

    Args:
        loaders: T ``torch.utils.data.DataLoader``, or other objects with a length that can be iterated repeatedly.
            A task is identified by its position.
        scheme: one of the five above.
        epochs: E, which "annealed" needs. The other schemes have no end.
        steps: the number of steps in an epoch, in place of the table's.
        sizes: N_1 … N_T for "proportional" and "annealed"; None for ``len(loader.dataset)``.
        seed: an integer, at least 0.

    Attributes:
        epoch: the number of finished epochs. An epoch is finished when its loop has ended, not yet in its last step.
        step: the number of steps taken in the present epoch.

    Raises:
        TypeError, ValueError: an argument is not as said above, a loader is empty, or the scheme needs sizes and a
            loader's dataset has none. On iteration: epoch E + 1 of "annealed".
    """

    def __init__(
        self,
        loaders: Sequence[Iterable[Any]],
        scheme: str = "joint",
        *,
        epochs: int | None = None,
        steps: int | None = None,
        sizes: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        self._lengths = checked_lengths(loaders)
        if not isinstance(scheme, str) or scheme not in SCHEMES:
            raise ValueError(f"scheme must be one of {', '.join(map(repr, SCHEMES))}; got {scheme!r}")
        self.scheme = scheme
        self.epochs = None if epochs is None else integer("epochs", epochs, 1)
        if scheme == "annealed" and epochs is None:
            raise ValueError("epochs must be given for scheme='annealed', got None")
        self.steps = None if steps is None else integer("steps", steps, 1)
        self.sizes = None if sizes is None else checked_sizes(sizes, len(loaders))
        self.seed = integer("seed", seed, 0)
        self.epoch = 0
        self.step = 0
        self._n_steps = _default_steps(scheme, self._lengths) if self.steps is None else self.steps
        # "random" draws as if all tasks had equally many examples.
        self._n_examples = (self.sizes or dataset_sizes(loaders)) if scheme in BY_SIZE else [1] * len(loaders)
        self._streams = [Stream(loader, self.seed, task) for task, loader in enumerate(loaders)]
        self._drawn: tuple[int, list[int]] = -1, []  # an epoch and its tasks

    def __len__(self) -> int:
        return self._n_steps

    def __iter__(self) -> Iterator[list[Any]]:
        # The sampler keeps the position, so that a new loop continues after an early exit or a loaded state.
        while self.step < self._n_steps:
            tasks = self._tasks()
            batches = [stream.draw() if task in tasks else None for task, stream in enumerate(self._streams)]
            self.step += 1
            yield batches
        self.epoch += 1
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the sampler's arguments and position as integers, strings, lists and tensors."""
        return {
            **self._identity(),
            "epoch": self.epoch,
            "step": self.step,
            "passes": [stream.passes for stream in self._streams],
            "taken": [stream.taken for stream in self._streams],
            "generators_at_pass": [stream.generators_at_pass for stream in self._streams],
            "generators_now": [states(stream.generators) for stream in self._streams],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to the position at which :meth:`state_dict` was taken.

        Every loader draws the batches of its present pass again: one pass at most, at the speed of the loader.

        Args:
            state_dict: the state of a sampler with the same arguments, over loaders of the same lengths.

        Raises:
            ValueError: ``state_dict`` is of another sampler. The message names the difference. Nothing has changed.
        """
        self._check(state_dict)
        streams = [Stream(stream.loader, self.seed, stream.task) for stream in self._streams]
        before = [states(stream.generators) for stream in streams]
        try:
            for i, stream in enumerate(streams):
                stream.go_to(state_dict["passes"][i], state_dict["taken"][i], state_dict["generators_at_pass"][i])
        except Exception:
            for stream, state in zip(streams, before, strict=True):
                set_states(stream.generators, state)
            raise
        for i, stream in enumerate(streams):  # a loop of its own, since loaders may share a generator
            set_states(stream.generators, state_dict["generators_now"][i])
        self._streams = streams
        self.epoch = state_dict["epoch"]
        self.step = state_dict["step"]

    def __repr__(self) -> str:
        return (
            f"TaskSampler(loaders, scheme={self.scheme!r}, epochs={self.epochs}, steps={self.steps}, "
            f"sizes={self.sizes}, seed={self.seed})"
        )

    def _identity(self) -> dict[str, Any]:
        """Return the values that two samplers must have in common to give the same batches."""
        return {
            "lengths": self._lengths,
            "scheme": self.scheme,
            "seed": self.seed,
            "steps": self._n_steps,
            "sizes": self._n_examples,
            "epochs": self.epochs if self.scheme == "annealed" else None,
            "generators": [len(stream.generators) for stream in self._streams],
        }

    def _check(self, state_dict: dict[str, Any]) -> None:
        names = list(self.state_dict())
        if not isinstance(state_dict, dict) or set(state_dict) != set(names):
            given = list(state_dict) if isinstance(state_dict, dict) else state_dict
            raise ValueError(f"state_dict must hold {names}, got {given!r}")
        for name, own in self._identity().items():
            if state_dict[name] != own:
                raise ValueError(f"state_dict has {name} = {state_dict[name]!r}, this sampler has {own!r}")
        integer("epoch", state_dict["epoch"], 0)
        if integer("step", state_dict["step"], 0) > self._n_steps:
            raise ValueError(f"step must be at most {self._n_steps}, got {state_dict['step']}")
        for name in ("passes", "taken", "generators_at_pass", "generators_now"):
            values = state_dict[name]
            if not isinstance(values, list) or len(values) != len(self._streams):
                raise ValueError(f"{name} must be a list with one entry per task, got {values!r}")
        for name in ("passes", "taken"):
            for value in state_dict[name]:
                integer(name, value, 0)

    def _tasks(self) -> Sequence[int]:
        """Return the tasks of the next step."""
        T = len(self._streams)
        if self.scheme == "joint":
            return range(T)
        if self.scheme == "round_robin":
            return [(self.epoch * self._n_steps + self.step) % T]
        if self._drawn[0] != self.epoch:  # drawn for a whole epoch at once, so that resuming is indexing
            generator = torch.Generator("cpu").manual_seed(derived_seed(self.seed, 0, self.epoch))
            order = torch.multinomial(self._probabilities(), self._n_steps, replacement=True, generator=generator)
            self._drawn = self.epoch, order.tolist()
        return [self._drawn[1][self.step]]

    def _probabilities(self) -> Tensor:
        """Return p_i of the present epoch, (T,), float64."""
        alpha = self._annealed_exponent() if self.scheme == "annealed" else 1.0
        weights = torch.tensor(self._n_examples, dtype=torch.float64, device="cpu") ** alpha
        return weights / weights.sum()

    def _annealed_exponent(self) -> float:
        if self.epochs is None or self.epoch >= self.epochs:
            raise ValueError(f"epochs={self.epochs} are finished; scheme='annealed' has no epoch {self.epoch + 1}")
        return 1.0 - 0.8 * self.epoch / max(self.epochs - 1, 1)


def _default_steps(scheme: str, lengths: list[int]) -> int:
    if scheme == "joint":
        return max(lengths)
    return len(lengths) * max(lengths) if scheme == "round_robin" else sum(lengths)
