"""Wrong arguments: every public callable answers with an exception that names the argument, and changes nothing.

The table is in ``methods.py`` and ``training.py``, the wrong values in ``values.py``. A public argument that is not in
the table fails a test here.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import gradkern as gk
from gradkern.compat import amp, pcgrad
from gradkern.sampling import TaskSampler
from tests.arguments import methods, training
from tests.arguments.call import Call
from tests.arguments.values import shortened

TABLE = [*methods.operators(), *methods.losses(), *methods.constructors(), *methods.methods(), *training.steps()]
TABLE += [*training.optimizers(), *training.samplers(), *training.other_interfaces()]
CALLS = {f"{call.name} {call.variant}".strip(): call for call in TABLE}

PUBLIC = [*(getattr(gk, name) for name in gk.__all__), gk.optim.AdamW, TaskSampler, pcgrad.PCGrad]
PUBLIC += [amp.PCGradAMP, amp.GradVacAMP]

NOT_OF_USERS = {
    "Aggregator": "the base of methods, which users make through their subclasses",
    "SurgeryInfo": "made by steps",
    "Advice": "made by advise",
    "solution": "called by steps",
    "program": "called by steps",
    "task_weights": "called by steps",
    "weights_like": "called by steps",
    "weigh": "called by steps",
    "observe": "called by steps",
    "multipliers": "called by steps",
    "positions": "called by steps",
    "rates": "called by steps",
    "scales": "called by steps",
    "knows": "called by steps",
    "rows_for": "called by steps",
    "starts": "called by steps",
    "move": "called by steps",
    "moved": "called by steps",
    "of_update": "called by steps",
    "check_tasks": "called by steps",
    "combine_entries": "called by steps",
    "advance": "called by steps",
    "Entrywise.weights": "no argument is right",
    "first_units": "called by steps",
    "mask": "called by steps",
    "signs": "called by steps",
    "check": "called by steps",
    "get_extra_state": "called by torch",
    "set_extra_state": "called by torch, with what load_state_dict has checked",
    "zero_grad": "torch's, with torch's rules",
}


UNUSED = {("FixedWeights.weights", "losses")}
"""Arguments that are there because those of a base class are."""


def _public() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield every public callable of this library with its qualified name."""
    for thing in PUBLIC:
        if thing.__name__ not in NOT_OF_USERS:
            yield thing.__name__, thing
        if inspect.isclass(thing):
            for name, member in inspect.getmembers(thing, inspect.isfunction):
                ours = member.__module__.startswith("gradkern") and not hasattr(member, "__isabstractmethod__")
                if ours and not name.startswith("_") and {name, member.__qualname__}.isdisjoint(NOT_OF_USERS):
                    yield member.__qualname__, member


def test_the_table_has_every_argument_of_every_public_callable() -> None:
    covered = {(call.name, argument) for call in CALLS.values() for argument in call.wrong}
    expected = {
        (name, argument)
        for name, thing in _public()
        for argument, kind in inspect.signature(thing).parameters.items()
        if argument not in ("self", "strict", "assign") and kind.kind not in (kind.VAR_POSITIONAL, kind.VAR_KEYWORD)
    }
    assert expected - covered == UNUSED


@pytest.mark.parametrize("name", CALLS)
def test_the_right_call_is_right(name: str) -> None:
    """Otherwise the answers to wrong arguments would prove nothing."""
    prepared = CALLS[name].prepare()
    prepared.function(**prepared.arguments)


ARGUMENTS = [(name, argument) for name, call in CALLS.items() for argument in call.wrong]


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS, ids=[f"{name}-{argument}" for name, argument in ARGUMENTS])
def test_a_wrong_argument_is_named_and_nothing_changes(name: str, argument: str) -> None:
    faults = [fault for value in CALLS[name].wrong[argument]() if (fault := _fault(CALLS[name], argument, value))]
    assert not faults, "\n".join(faults)


_ALSO: dict[str, tuple[type[Exception], ...]] = {"load_state_dict": (RuntimeError,)}
"""Other exceptions of some methods: torch's Modules raise RuntimeError for missing keys."""


def _fault(call: Call, argument: str, value: Any) -> str | None:
    """Return what is wrong with the answer to a wrong value; None if nothing is."""
    prepared = call.prepare()
    before = prepared.state()
    given = f"{argument}={shortened(value)}"
    try:
        prepared.function(**prepared.arguments | {argument: value})
    except (TypeError, ValueError, *_ALSO.get(call.name.rpartition(".")[2], ())) as error:
        if not re.search(rf"\b{argument}\b", str(error)):
            return f"{given}: the message does not name the argument: {error}"
    except Exception as error:  # what users should not see
        return f"{given}: {error!r}"
    else:
        return f"{given} is accepted"
    return None if _same(before, prepared.state()) else f"{given} has changed something"


def _same(a: Any, b: Any) -> bool:
    """Return whether two states hold the same numbers; NaN is the same as NaN."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return a is b or bool(a == b)
