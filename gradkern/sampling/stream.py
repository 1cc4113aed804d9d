"""The endless stream of one loader's batches, with all its random numbers under control."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradkern.arguments import shown, tensor

_END = object()
"""Stands in place of a batch at the end of a pass."""


class Stream:
    """Draws one loader's batches without end, pass after pass.

    Attributes:
        generators: the generators that belong to the loader.
        generators_at_pass: their states at the start of the present pass.
        passes: the number of passes that have begun.
        taken: the number of batches drawn in the present pass.
    """

    def __init__(self, loader: Iterable[Any], seed: int, task: int) -> None:
        self.loader = loader
        self.seed = seed
        self.task = task
        self.generators = _generators(loader)
        self.generators_at_pass = states(self.generators)
        self.passes = 0
        self.taken = 0
        self._batches: Iterator[Any] = iter(())
        self._default_state = torch.default_generator.get_state()  # the default generator as this pass sees it
        self._workers_to_start = getattr(loader, "persistent_workers", False)

    def draw(self) -> Any:
        """Return the next batch."""
        batch = self._next()
        if batch is _END:
            self._begin_pass()
            batch = self._next()
        if batch is _END:
            raise ValueError(f"loaders[{self.task}] has a length, but gave no batch")
        self.taken += 1
        return batch

    def go_to(self, passes: int, taken: int, generators_at_pass: list[Tensor]) -> None:
        """Go from a fresh start to the point after ``taken`` batches of the ``passes``-th pass."""
        if passes == 0:
            return
        self.passes = passes - 1
        self._begin_pass(generators_at_pass)
        for self.taken in range(1, taken + 1):
            if self._next() is _END:
                raise ValueError(f"loaders[{self.task}] ends before its batch {taken}, which state_dict has seen")

    def _begin_pass(self, generators: list[Tensor] | None = None) -> None:
        if self._workers_to_start:
            # The first iter() of a loader with persistent workers draws a seed for them; later ones do not. This extra
            # iter() takes that seed, so that every pass begins alike, the first and a resumed one too.
            self._iter()
            self._workers_to_start = False
        if generators is not None:
            set_states(self.generators, generators)
        self.generators_at_pass = states(self.generators)
        self._batches = self._iter()
        self.passes += 1
        self.taken = 0

    def _iter(self) -> Iterator[Any]:
        with torch.random.fork_rng(devices=[]):
            # Seed the CPU's generator only; torch.manual_seed would seed the generators of all GPUs too.
            torch.default_generator.manual_seed(derived_seed(self.seed, 1 + self.task, self.passes))
            batches = iter(self.loader)
            self._default_state = torch.default_generator.get_state()
        return batches

    def _next(self) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.set_state(self._default_state)
            batch = next(self._batches, _END)
            self._default_state = torch.default_generator.get_state()
        return batch


def derived_seed(seed: int, *key: int) -> int:
    """Return a seed of 64 bits. Streams of different keys are practically independent."""
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0])


def _generators(loader: Iterable[Any]) -> list[torch.Generator]:
    """Return the generators that belong to a loader and its samplers, each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)
    brought = [getattr(holder, "generator", None) for holder in holders]
    own = [g for g in brought if isinstance(g, torch.Generator) and g is not torch.default_generator]
    return list(dict.fromkeys(own))


def states(generators: list[torch.Generator]) -> list[Tensor]:
    """Return the states of the generators."""
    return [generator.get_state() for generator in generators]


def set_states(generators: list[torch.Generator], states: list[Tensor]) -> None:
    """Set the generators to states that :func:`states` returned."""
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state.cpu())  # torch.load may have put it on another device


def check_states(name: str, generators: list[torch.Generator], states: object) -> None:
    """Raise unless ``states`` are states of the generators; these do not change."""
    if not isinstance(states, list) or len(states) != len(generators):
        raise ValueError(f"{name} must be a list of {len(generators)} states of generators, got {shown(states)}")
    for generator, state in zip(generators, states, strict=True):
        try:
            torch.Generator(generator.device).set_state(tensor(name, state, (torch.uint8,)).cpu())
        except RuntimeError as error:
            raise ValueError(f"{name} must hold states of generators, got one that torch refuses: {error}") from error
