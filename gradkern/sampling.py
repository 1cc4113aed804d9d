"""Which task trains next: one stream of steps from one data loader per task."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

SCHEMES = ("joint", "round_robin", "random", "proportional", "annealed")
BY_SIZE = ("proportional", "annealed")


class TaskSampler:
    """Draws, step by step, which tasks train and their batches.

    Iterating it is one epoch, and ``len`` its number of steps::

        sampler = TaskSampler(loaders, "annealed", epochs=10)
        for epoch in range(sampler.epoch, 10):
            for batches in sampler:  # one entry per task: its batch, or None where the task is absent
                losses = [None if b is None else loss(t, b) for t, b in enumerate(batches)]
                opt.zero_grad()
                gk.backward(losses, model, aggregator=gk.PCGrad())
                opt.step()

    Of T loaders of L_i batches and N_i examples:

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

    A loader that runs out begins another pass, reshuffled if it shuffles, and a pass runs on into the next epoch, as
    round robin's turns do: no example comes up more often for standing first.

    **Random numbers.** An epoch's tasks are a function of (seed, epoch). Whatever a loader takes from torch's default
    CPU generator in its n-th pass, be it for shuffling or in the dataset, comes from a stream seeded by
    (seed, task, n), and the default generator itself stays as it is. A generator that a loader or its sampler brings
    is used as it stands: ``seed`` does not touch it.

    **Resuming.** :meth:`state_dict` may be taken anywhere, inside the loop too. A sampler over loaders made anew that
    loads it continues the epoch with the very batches that would have come; where the state was taken in the last
    step, that is none, and the epoch ends. ``persistent_workers`` may not change meanwhile; the number of workers may,
    where loaders bring no generators (workers take from those ahead of time).
    Three kinds of random numbers do not come again: those of NumPy and of Python's ``random``; those a dataset draws in
    persistent workers; those that loaders with a common generator take from it later than at the start of a pass (there
    it is that torch shuffles).

    Sources: "Rhapsody on a Theme of Gradient Surgery", §3.2; annealed: Stickland & Murray 2019, "BERT and PALs".

    Args:
        loaders: T ``torch.utils.data.DataLoader``, or other objects with a length that can be iterated again and again.
            A task is known by its position.
        scheme: one of the five above.
        epochs: E, which "annealed" needs. The other schemes have no end.
        steps: of an epoch, in place of the table's.
        sizes: N_1 … N_T for "proportional" and "annealed"; None for ``len(loader.dataset)``.
        seed: an integer, at least 0.

    Attributes:
        epoch: how many epochs have been finished. One is when its loop has ended, not yet in its last step.
        step: how many steps of the present epoch have been taken.

    Raises:
        TypeError, ValueError: an argument is not as said above, a loader is empty, or one has no dataset of known size
            where ``sizes`` would be needed. On iteration: epoch E + 1 of "annealed".
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
        self._lengths = _checked_lengths(loaders)
        if not isinstance(scheme, str) or scheme not in SCHEMES:
            raise ValueError(f"scheme must be one of {', '.join(map(repr, SCHEMES))}; got {scheme!r}")
        self.scheme = scheme
        self.epochs = None if epochs is None else _integer("epochs", epochs, 1)
        if scheme == "annealed" and epochs is None:
            raise ValueError("epochs must be given for scheme='annealed', got None")
        self.steps = None if steps is None else _integer("steps", steps, 1)
        self.sizes = None if sizes is None else _checked_sizes(sizes, len(loaders))
        self.seed = _integer("seed", seed, 0)
        self.epoch = 0
        self.step = 0
        self._n_steps = _default_steps(scheme, self._lengths) if self.steps is None else self.steps
        # "random" draws as if all tasks had as many examples.
        self._n_examples = (self.sizes or _dataset_sizes(loaders)) if scheme in BY_SIZE else [1] * len(loaders)
        self._streams = [_Stream(loader, self.seed, task) for task, loader in enumerate(loaders)]
        self._drawn: tuple[int, list[int]] = -1, []  # an epoch and its tasks

    def __len__(self) -> int:
        return self._n_steps

    def __iter__(self) -> Iterator[list[Any]]:
        # The position is the sampler's, so that a loop that was left, or a state that is loaded, can go on.
        while self.step < self._n_steps:
            tasks = self._tasks()
            batches = [stream.draw() if task in tasks else None for task, stream in enumerate(self._streams)]
            self.step += 1
            yield batches
        self.epoch += 1
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        """What the sampler is and where it is, in integers, strings, lists and tensors."""
        return {
            **self._identity(),
            "epoch": self.epoch,
            "step": self.step,
            "passes": [stream.passes for stream in self._streams],
            "taken": [stream.taken for stream in self._streams],
            "generators_at_pass": [stream.generators_at_pass for stream in self._streams],
            "generators_now": [_states(stream.generators) for stream in self._streams],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to where :meth:`state_dict` was taken.

        Every loader draws again the batches that had been taken of its present pass: one pass at most, at the speed of
        the loader.

        Args:
            state_dict: of a sampler with the same arguments, over loaders of the same lengths.

        Raises:
            ValueError: ``state_dict`` is of another sampler; the message says in what it differs. Nothing has changed.
        """
        self._check(state_dict)
        streams = [_Stream(stream.loader, self.seed, stream.task) for stream in self._streams]
        before = [_states(stream.generators) for stream in streams]
        try:
            for i, stream in enumerate(streams):
                stream.go_to(state_dict["passes"][i], state_dict["taken"][i], state_dict["generators_at_pass"][i])
        except Exception:
            for stream, states in zip(streams, before, strict=True):
                _set_states(stream.generators, states)
            raise
        for i, stream in enumerate(streams):  # after all of them: loaders may share a generator
            _set_states(stream.generators, state_dict["generators_now"][i])
        self._streams = streams
        self.epoch = state_dict["epoch"]
        self.step = state_dict["step"]

    def __repr__(self) -> str:
        return (
            f"TaskSampler(loaders, scheme={self.scheme!r}, epochs={self.epochs}, steps={self.steps}, "
            f"sizes={self.sizes}, seed={self.seed})"
        )

    def _identity(self) -> dict[str, Any]:
        """What two samplers must have in common to give the same batches."""
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
        _integer("epoch", state_dict["epoch"], 0)
        if _integer("step", state_dict["step"], 0) > self._n_steps:
            raise ValueError(f"step must be at most {self._n_steps}, got {state_dict['step']}")
        for name in ("passes", "taken", "generators_at_pass", "generators_now"):
            values = state_dict[name]
            if not isinstance(values, list) or len(values) != len(self._streams):
                raise ValueError(f"{name} must be a list with one entry per task, got {values!r}")
        for name in ("passes", "taken"):
            for value in state_dict[name]:
                _integer(name, value, 0)

    def _tasks(self) -> Sequence[int]:
        """The tasks of the step to come."""
        T = len(self._streams)
        if self.scheme == "joint":
            return range(T)
        if self.scheme == "round_robin":
            return [(self.epoch * self._n_steps + self.step) % T]
        if self._drawn[0] != self.epoch:  # a whole epoch in one go: resuming is indexing
            generator = torch.Generator("cpu").manual_seed(_derived_seed(self.seed, 0, self.epoch))
            order = torch.multinomial(self._probabilities(), self._n_steps, replacement=True, generator=generator)
            self._drawn = self.epoch, order.tolist()
        return [self._drawn[1][self.step]]

    def _probabilities(self) -> Tensor:
        """p_i of the present epoch, (T,), float64."""
        alpha = self._annealed_exponent() if self.scheme == "annealed" else 1.0
        weights = torch.tensor(self._n_examples, dtype=torch.float64, device="cpu") ** alpha
        return weights / weights.sum()

    def _annealed_exponent(self) -> float:
        if self.epochs is None or self.epoch >= self.epochs:
            raise ValueError(f"epochs={self.epochs} are finished; scheme='annealed' has no epoch {self.epoch + 1}")
        return 1.0 - 0.8 * self.epoch / max(self.epochs - 1, 1)


_END = object()
"""In place of a batch where a pass ends."""


class _Stream:
    """One loader's batches without end, pass after pass.

    Attributes:
        generators: those the loader brings.
        generators_at_pass: their states when the present pass began.
        passes: how many passes have begun.
        taken: how many batches of the present pass have been drawn.
    """

    def __init__(self, loader: Iterable[Any], seed: int, task: int) -> None:
        self.loader = loader
        self.seed = seed
        self.task = task
        self.generators = _generators(loader)
        self.generators_at_pass = _states(self.generators)
        self.passes = 0
        self.taken = 0
        self._batches: Iterator[Any] = iter(())
        self._default_state = torch.default_generator.get_state()  # as the pass sees it
        self._workers_to_start = getattr(loader, "persistent_workers", False)

    def draw(self) -> Any:
        """The next batch."""
        batch = self._next()
        if batch is _END:
            self._begin_pass()
            batch = self._next()
        if batch is _END:
            raise ValueError(f"loaders[{self.task}] has a length, but gave no batch")
        self.taken += 1
        return batch

    def go_to(self, passes: int, taken: int, generators_at_pass: list[Tensor]) -> None:
        """From a fresh start to where ``taken`` batches of the ``passes``-th pass have been drawn."""
        if passes == 0:
            return
        self.passes = passes - 1
        self._begin_pass(generators_at_pass)
        for self.taken in range(1, taken + 1):
            if self._next() is _END:
                raise ValueError(f"loaders[{self.task}] ends before its batch {taken}, which state_dict has seen")

    def _begin_pass(self, generators: list[Tensor] | None = None) -> None:
        if self._workers_to_start:
            # The first iter() of a loader with persistent workers draws a seed for them, which the later ones do not.
            # After an iter() in vain every pass begins alike, the first and one that is resumed too.
            self._iter()
            self._workers_to_start = False
        if generators is not None:
            _set_states(self.generators, generators)
        self.generators_at_pass = _states(self.generators)
        self._batches = self._iter()
        self.passes += 1
        self.taken = 0

    def _iter(self) -> Iterator[Any]:
        with torch.random.fork_rng(devices=[]):
            # The CPU's alone: torch.manual_seed would seed the generators of all GPUs too.
            torch.default_generator.manual_seed(_derived_seed(self.seed, 1 + self.task, self.passes))
            batches = iter(self.loader)
            self._default_state = torch.default_generator.get_state()
        return batches

    def _next(self) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.set_state(self._default_state)
            batch = next(self._batches, _END)
            self._default_state = torch.default_generator.get_state()
        return batch


def _derived_seed(seed: int, *key: int) -> int:
    """A seed of 64 bits, for streams as good as independent for different keys."""
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0])


def _generators(loader: Iterable[Any]) -> list[torch.Generator]:
    """The generators that a loader and its samplers bring, each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)
    brought = [getattr(holder, "generator", None) for holder in holders]
    own = [g for g in brought if isinstance(g, torch.Generator) and g is not torch.default_generator]
    return list(dict.fromkeys(own))


def _states(generators: list[torch.Generator]) -> list[Tensor]:
    return [generator.get_state() for generator in generators]


def _set_states(generators: list[torch.Generator], states: list[Tensor]) -> None:
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state.cpu())  # torch.load may have put it on another device


def _default_steps(scheme: str, lengths: list[int]) -> int:
    if scheme == "joint":
        return max(lengths)
    return len(lengths) * max(lengths) if scheme == "round_robin" else sum(lengths)


def _checked_lengths(loaders: object) -> list[int]:
    if not isinstance(loaders, Sequence) or isinstance(loaders, str | bytes):
        raise TypeError(f"loaders must be a sequence of data loaders, one per task; got {type(loaders).__name__}")
    if not loaders:
        raise ValueError(f"loaders is empty: {loaders!r}")
    first: dict[int, int] = {}
    lengths = []
    for i, loader in enumerate(loaders):
        kind = type(loader).__name__
        if not isinstance(loader, Iterable) or isinstance(loader, Iterator):
            raise TypeError(f"loaders[{i}] must be a data loader that can be iterated again and again, got {kind}")
        length = _length(loader)
        if length is None:
            raise TypeError(f"loaders[{i}] must have a length, got {kind} without one")
        if length == 0:
            raise ValueError(f"loaders[{i}] has no batches: its length is 0")
        j = first.setdefault(id(loader), i)
        if j != i:
            raise ValueError(f"loaders[{j}] and loaders[{i}] are one object; each task needs a loader of its own")
        lengths.append(length)
    return lengths


def _dataset_sizes(loaders: Sequence[Iterable[Any]]) -> list[int]:
    sizes = []
    for i, loader in enumerate(loaders):
        size = _length(getattr(loader, "dataset", None))
        if not size:
            raise ValueError(f"sizes is None, and loaders[{i}] has no dataset with a length: give sizes")
        sizes.append(size)
    return sizes


def _checked_sizes(sizes: object, n_tasks: int) -> list[int]:
    if not isinstance(sizes, Sequence) or isinstance(sizes, str | bytes):
        raise TypeError(f"sizes must be a sequence of integers, one per task; got {sizes!r}")
    if len(sizes) != n_tasks:
        raise ValueError(f"sizes has {len(sizes)} entries for {n_tasks} loaders: {sizes!r}")
    return [_integer(f"sizes[{i}]", size, 1) for i, size in enumerate(sizes)]


def _integer(name: str, value: object, least: int) -> int:
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not least <= value < 2**63:
        raise ValueError(f"{name} must be at least {least} and below 2**63, got {value}")
    return int(value)


def _length(thing: object) -> int | None:
    try:
        return len(thing)  # type: ignore[arg-type]  # a DataLoader has __len__ even where its dataset has none
    except TypeError:
        return None
