"""Checks of what an optimizer is given: parameter groups, closures and states."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradkern.arguments import instance, listed, number, shown
from gradkern.distributed.comm import comm_of
from gradkern.gradients.parameters import Groups, Parameters, Params, Targets, read
from gradkern.step.options import Options
from gradkern.step.refused_ways import refuse_options


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


def check_group(param_group: object, params: Sequence[Any], groups: Groups, shared: Params | None) -> None:
    """Raise TypeError or ValueError unless a group can be added to ``params``; see :func:`checked_group`."""
    added = checked_group(param_group)
    entries = added.tensors if added.names is None else zip(added.names, added.tensors, strict=True)
    try:
        Targets.of([*params, *entries], groups, shared)
    except (TypeError, ValueError) as error:
        raise type(error)(f"param_group does not go with the parameters so far: {error}") from error


def check_options(options: Options, params: Sequence[Any]) -> None:
    """Raise what each step would raise, as far as its options and parameters tell."""
    comm_of(options.process_group)
    Targets.of(params, options.groups, options.shared)
    refuse_options(options)


def checked_limit(max_norm: object, scaler: object) -> float | None:
    """Return the largest norm of an update; raise TypeError or ValueError unless it and the scaler are ones."""
    if scaler is not None:
        instance("scaler", scaler, torch.amp.GradScaler, "a torch.amp.GradScaler or None")
    return None if max_norm is None else number("max_norm", max_norm, above=0, infinite=True)


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
