"""Checks of what an optimizer is given: parameter groups, closures and states."""

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from torch import Tensor

from gradkern.arguments import shown
from gradkern.gradients.parameters import Parameters, read


def listed(name: str, params: object, wanted: str) -> list[Any]:
    """Return parameters, which the message calls ``wanted``, as a list."""
    if isinstance(params, (Tensor, str, bytes, Set, Mapping)) or not isinstance(params, Iterable):
        raise TypeError(f"{name} must be {wanted}, got {shown(params)}")
    return list(params)


def checked_group(param_group: object) -> Parameters:
    """Return the parameters of a group. If an iterator holds them, the group has a list from then on, as torch does it.

    Raises:
        TypeError, ValueError: ``param_group`` is no dictionary with "params", or these are not distinct leaf tensors.
    """
    if not isinstance(param_group, dict):
        raise TypeError(f"param_group must be a dictionary that holds 'params', got {shown(param_group)}")
    if "params" not in param_group:
        raise ValueError(f"param_group must hold 'params', got {shown(list(param_group))}")
    params, name = param_group["params"], "param_group['params']"
    if not isinstance(params, Tensor):
        params = param_group["params"] = listed(name, params, "tensors or (name, tensor) pairs")
    given = read(name, [params] if isinstance(params, Tensor) else params)
    if len(set(map(id, given.tensors))) < len(given.tensors):
        raise ValueError(f"{name} holds a tensor twice: {shown([tuple(p.shape) for p in given.tensors])}")
    for k, p in enumerate(given.tensors):
        if not (p.is_leaf or p.retains_grad):
            raise ValueError(f"{name} must be leaf tensors; {given.name(k)} is computed")
    return given


def check_closure(closure: object) -> None:
    """Raise TypeError unless a step's closure is a function or None."""
    if closure is not None and not callable(closure):
        raise TypeError(f"closure must be a function or None, got {shown(closure)}")


def check_mapping(state_dict: object) -> None:
    """Raise TypeError unless a state to load is a mapping."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a dictionary, got {shown(state_dict)}")


def check_state(state_dict: Mapping[str, Any]) -> None:
    """Raise unless a state has the form of those of torch's optimizers, as far as torch relies on it."""
    if not {"state", "param_groups"} <= set(state_dict):
        raise ValueError(f"state_dict must hold 'state' and 'param_groups', got {shown(list(state_dict))}")
    states, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(states, Mapping):
        raise TypeError(f"state_dict['state'] must be a dictionary, got {shown(states)}")
    if not isinstance(groups, Sequence) or isinstance(groups, (str, bytes)):
        raise TypeError(f"state_dict['param_groups'] must be a list of dictionaries, got {shown(groups)}")
    for k, group in enumerate(groups):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), Sequence):
            raise ValueError(f"state_dict['param_groups'][{k}] must hold a list 'params', got {shown(group)}")
