"""Agreement of the ranks of a step: if one of them cannot take it, or takes another one, all of them raise.

The hosts exchange a few integers before a step's first backward pass, and again after its last one. Nothing has been
written then. A rank that has raised tells the others, so that they do not wait for it. A rank that is not in the step,
because its own code raised before or its process has ended, is found by the process group's timeout.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from hashlib import blake2b
from typing import TypeVar

from gradkern.distributed.comm import Comm

FAILED = -1
"""The first number of the message of a rank that has raised."""

Made = TypeVar("Made")
Facts = Mapping[str, int]
"""What a rank knows of the step, by name; in the same order on all ranks."""

UNEQUAL: dict[str, str] = {
    "steps": "the number of steps so far: {values}. One of them has left out a step, or has taken one alone",
    "method": "the method or its modifiers: {ranks}. Give all ranks the same method, with the same seed= if it has one",
    "way": "through, finish, gramian or per_example: {ranks}. Give all ranks the same, and a sketch of the same seed",
    "callables": "whether losses are callables: {ranks}. This method weighs losses: give it callables on all ranks, or "
    "tensors on all",
    "tasks": "the number of losses: {values}. Pass None for a task that a rank lacks",
    "parameters": "the number of params that require grad: {values}",
    "trained": "which of params require grad: {ranks}. Freeze the same parameters on all ranks",
    "numbers": "the number of elements in params: {values}",
    "layout": "the shapes, strides or dtypes of params, or their order: {ranks}",
    "groups": "the groups of params, or which of them are shared: {ranks}",
    "shard_optimizer": "shard_optimizer, True on some ranks alone: {ranks}",
    "update": "what update() finds or gets, a .grad or a post-accumulate hook, max_norm or scaler: {ranks}. "
    "Call zero_grad() on all ranks, and give all of them the same",
    "first step": "whether they have taken a step with these params, in this order, before: {ranks}",
    "values": "the values of params: {ranks}. Broadcast them from one rank before the first step, as "
    "DistributedDataParallel does, or build the model from the same seed",
    "layers": "which params several losses reach, or the layers that use them: {ranks}. Give all ranks losses of the "
    "same tasks, computed in the same way, or give through='rows'",
    "features": "the number of features that params lie below, their dtypes, or their shapes after dimension 0, over "
    "which their gradients are summed: {ranks}. With per_example=True the shapes may differ",
    "state": "the parameters or the state of the method: {ranks}. Make it from the same seed on all ranks, or load the "
    "same checkpoint on all",
}
"""The facts that all ranks must have in common, and how an error tells of them."""


WORDS = 21
"""The number of integers in a message, which is as long for a rank that has failed."""


def together(comm: Comm, work: Callable[[], Made], facts: Callable[[Made], Facts]) -> tuple[Made, list[Facts]]:
    """Run ``work`` on every rank, and return its result on this one, and the facts of all ranks.

    Raises:
        RuntimeError: the work of another rank has raised, and not that of this one.
        ValueError: facts of ``UNEQUAL`` differ. All ranks raise the same.
    """
    try:
        made = work()
        own = facts(made)
    except Exception as error:
        with suppress(Exception):  # the others may have gone
            comm.exchange(_message(FAILED))
            comm.exchange_texts(f"{type(error).__name__}: {error}")
        raise
    messages = comm.exchange(_message(digest("facts", *own), *own.values()))
    failed = [r for r, (kind, *_) in enumerate(messages) if kind == FAILED]
    if failed:
        text = comm.exchange_texts("")[failed[0]]
        raise RuntimeError(f"no rank takes this step, and nothing has changed, because rank {failed[0]} raised {text}")
    _compare([kind for kind, *_ in messages], "where they are in a step: {ranks}")
    of_ranks: list[Facts] = [dict(zip(own, values, strict=False)) for _, *values in messages]
    for name, text in UNEQUAL.items():
        if name in own:
            _compare([of_rank[name] for of_rank in of_ranks], text)
    return made, of_ranks


def _message(*numbers: int) -> list[int]:
    return [*numbers, *[0] * (WORDS - len(numbers))]


def _compare(values: Sequence[int], text: str) -> None:
    """Raise ValueError unless the values of all ranks are the same."""
    others = [r for r, value in enumerate(values) if value != values[0]]
    if not others:
        return
    r = others[0]
    told = text.format(
        values=f"rank 0 has {values[0]}, rank {r} has {values[r]}", ranks=f"those of rank {r} are not those of rank 0"
    )
    raise ValueError(f"all ranks must take the same step, but they differ in {told}")


@lru_cache(maxsize=256)
def digest(name: str, *values: object) -> int:
    """Return 63 bits that differ for different values; equal in all processes for equal numbers, strings and tuples.

    Args:
        name: whose values they are. Its values have the same types at each call: the cache takes True for 1, whose bits
            are others.
        values: the values.
    """
    return int.from_bytes(blake2b(repr(values).encode(), digest_size=8).digest(), "big") >> 1
