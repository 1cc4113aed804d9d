"""Checks of AdamW's hyperparameters and of the states that it loads."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradkern.arguments import boolean, number, shown
from gradkern.gradients.sharded import is_dtensor, is_of_this_rank
from gradkern.ops.dtypes import DTYPES, arithmetic_dtype
from gradkern.optim.arguments import check_state

Check = Callable[[object], Any]


def learning_rate(value: object) -> float | Tensor:
    """Return a learning rate: a finite number from 0 on, or a floating tensor of one element, which is not read."""
    if not isinstance(value, Tensor):
        return number("lr", value, least=0)
    if not value.is_floating_point():
        raise TypeError(f"lr must be a number or a floating tensor, got {value.dtype}")
    if value.numel() != 1:
        raise ValueError(f"lr must have one element, got shape {tuple(value.shape)}")
    return value


def decay_rates(value: object) -> tuple[float, ...]:
    """Return the decay rates of AdamW's two moments, each from 0 to below 1."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise TypeError(f"betas must be two numbers, got {shown(value)}")
    if len(value) != 2:
        raise ValueError(f"betas must be two numbers, got {shown(value)}")
    return tuple([number(f"betas[{i}]", beta, least=0, below=1) for i, beta in enumerate(value)])


ADAMW: dict[str, Check] = {
    "lr": learning_rate,
    "betas": decay_rates,
    "eps": lambda value: number("eps", value, least=0),
    "weight_decay": lambda value: number("weight_decay", value, least=0),
    "amsgrad": lambda value: boolean("amsgrad", value),
    "maximize": lambda value: boolean("maximize", value),
    "capturable": lambda value: boolean("capturable", value),
}
"""AdamW's hyperparameters, and what checks each."""


def adamw_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of AdamW's hyperparameters that are given, checked; NumPy's numbers become Python's."""
    return {name: check(given[name]) for name, check in ADAMW.items() if name in given}


def refuse_unfused(given: Mapping[str, Any]) -> None:
    """Raise unless the options that choose among torch's implementations, where given, allow the fused one."""
    for name, allowed in (("foreach", (None, False)), ("differentiable", (False,)), ("fused", (None, True))):
        value = given.get(name, allowed[0])
        wanted = f"{name} must be {' or '.join(map(str, allowed))}, got {shown(value)}"
        if not (isinstance(value, bool) or (value is None and None in allowed)):
            raise TypeError(wanted)
        if value not in allowed:
            raise ValueError(f"{wanted}: use torch.optim.AdamW for steps that are not fused")


def check_dtype(name: str, p: Tensor) -> None:
    """Raise TypeError unless AdamW steps parameters of this dtype."""
    if p.is_complex():
        raise TypeError(
            f"{name} is {p.dtype}, which this AdamW does not step: torch.optim.AdamW does, and this one steps "
            "torch.view_as_real of it as a parameter"
        )
    if p.dtype not in DTYPES:
        raise TypeError(f"{name} is {p.dtype}, which AdamW does not step")


def check_adamw_state(state_dict: Mapping[str, Any]) -> None:
    """Raise unless a state has the form of AdamW's, with hyperparameters that it can have."""
    check_state(state_dict)
    for k, group in enumerate(state_dict["param_groups"]):
        missing = [name for name in ("lr", "betas", "eps", "weight_decay") if name not in group]
        if missing:
            raise ValueError(f"state_dict['param_groups'][{k}] must hold {missing}, got {shown(list(group))}")
        adamw_options(group)
    for number_of, state in state_dict["state"].items():
        if not isinstance(state, Mapping):
            raise TypeError(f"state_dict['state'][{number_of!r}] must be a dictionary, got {shown(state)}")
        if state and "step" not in state:
            raise ValueError(f"state_dict['state'][{number_of!r}] must hold 'step', got {shown(list(state))}")


def state_entry(name: str, value: Any, p: Tensor) -> Tensor:
    """Return a copy of a state's entry, converted to the dtype and layout of the state of ``p``."""
    if not isinstance(value, Tensor):
        value = torch.tensor(number(f"{name} in state_dict", value), device=p.device)
    if is_dtensor(value) and not is_of_this_rank(value):  # before it is detached: torch may then take an equal mesh
        raise ValueError(
            f"state_dict has {name} with another rank's part of a parameter of {tuple(p.shape)}: load on each rank the "
            "file that it has saved, or save and load with torch.distributed.checkpoint"
        )
    value = value.detach()
    if name == "step":
        if value.numel() != 1:
            raise ValueError(f"state_dict has a step of shape {tuple(value.shape)}, which must have one element")
        return value.to(p.device, torch.float32, copy=True).reshape(())
    if not value.is_floating_point():
        raise TypeError(f"state_dict has {name} of {value.dtype}, which must be floating")
    if value.shape != p.shape:
        raise ValueError(f"state_dict has {name} of shape {tuple(value.shape)} for a parameter of {tuple(p.shape)}")
    if is_dtensor(value) and not is_dtensor(p):  # the step has it whole, or cut among ranks
        return value.to(arithmetic_dtype(p.dtype), copy=True)
    return torch.empty_like(p, dtype=arithmetic_dtype(p.dtype)).copy_(value)
