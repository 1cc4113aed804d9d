"""Calls in several processes, each with a context of the GPU of its own: what takes time is compiling, on the CPU."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

import torch

from bench.first_contact.plan import WORKERS

Given = TypeVar("Given", bound=tuple[Any, ...])
Result = TypeVar("Result")


def each(function: Callable[..., Result], arguments: Sequence[Given]) -> Iterator[tuple[Given, Result]]:
    """Yield each call's arguments and result, as they come.

    Raises:
        BrokenProcessPool: a process died, as one with a fault in the driver does.
    """
    new = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(WORKERS, new, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        calls = {pool.submit(function, *given): given for given in arguments}
        for call in as_completed(calls):
            yield calls[call], call.result()
