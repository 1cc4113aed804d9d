"""The state of an optimizer's surgery, as checkpoints and copies contain it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradkern.arguments import shown
from gradkern.gradients.sharded import has_dtensors
from gradkern.ops.undo import PutBack, Undo
from gradkern.optim.arguments import check_mapping, check_state
from gradkern.optim.untracked import Untracked
from gradkern.optim.whole_means import means_here, whole_means
from gradkern.optim.wrapper import OptimizerWrapper
from gradkern.step.options import Options


@dataclass(frozen=True)
class Remembered:
    """The parts of an optimizer's surgery that have state, over ``params``."""

    options: Options
    params: Sequence[Tensor]

    def state_dict(self) -> dict[str, Any]:
        """Return the method's name and state, the seed and step of masks and sketch, and the gradients in ``memory``.

        It has whole gradients and means, so all ranks must call it if these are of DTensors.
        """
        method, suppression, memory = self.options.aggregator, self.options.suppression, self.options.memory
        sketch, state = self.options.way.gramian, dict(method.state_dict())
        return {
            "method": type(method).__name__,
            "state": whole_means(state, self.params) if self._has_parts else state,
            "suppression": None if suppression is None else suppression.state_dict(),
            "memory": None if memory is None else memory.state_dict(self.params),
            "sketch": None if sketch is None else sketch.state_dict(),
        }

    def load_state_dict(self, state_dict: Any) -> None:
        """Load a :meth:`state_dict`.

        Raises:
            ValueError: it belongs to another method, or does not fit. Parts of it may have been loaded then.
        """
        name = type(self.options.aggregator).__name__
        if not isinstance(state_dict, dict) or not {"method", "state"} <= set(state_dict):
            raise ValueError(f"state_dict['surgery'] must hold 'method' and 'state', got {shown(state_dict)}")
        if state_dict["method"] != name:
            raise ValueError(f"state_dict is of a step with {state_dict['method']}, this optimizer's method is {name}")
        suppression, memory = state_dict.get("suppression"), state_dict.get("memory")
        own_suppression, own_memory = self.options.suppression, self.options.memory
        sketch, own_sketch = state_dict.get("sketch"), self.options.way.gramian
        for part, saved, own in (("suppression", suppression, own_suppression), ("memory", memory, own_memory)):
            if saved is not None and own is None:
                raise ValueError(f"state_dict is of steps with {part}, but this optimizer has no {part}")
        state = state_dict["state"]
        self.options.aggregator.load_state_dict(means_here(state, self.params) if self._has_parts else state)
        if own_suppression is not None and suppression is not None:
            own_suppression.load_state_dict(suppression)
        if own_sketch is not None and sketch is not None:  # the way may change from run to run
            own_sketch.load_state_dict(sketch)
        if own_memory is not None and memory is not None:
            own_memory.load_state_dict(memory, self.params)

    @property
    def _has_parts(self) -> bool:
        """Whether the method's state has parts of whole means."""
        return self.options.aggregator.averages_rows and has_dtensors(self.params)


def save_with_surgery(optimizer: OptimizerWrapper, remembered: Remembered) -> dict[str, Any]:
    """Return the state of the wrapped optimizer with that of its surgery. The hooks are those of the wrapper."""
    for hook in optimizer._optimizer_state_dict_pre_hooks.values():
        hook(optimizer)
    state = _with_surgery(optimizer.optimizer.state_dict(), remembered.state_dict())
    for post_hook in optimizer._optimizer_state_dict_post_hooks.values():
        replaced = post_hook(optimizer, state)
        state = state if replaced is None else replaced
    return state


def load_with_surgery(optimizer: OptimizerWrapper, remembered: Remembered, state_dict: Any) -> None:
    """Load what :func:`save_with_surgery` returns, or an ordinary optimizer's state; or nothing, and raise."""
    check_mapping(state_dict)
    state = dict(state_dict)
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        replaced = hook(optimizer, state)
        state = state if replaced is None else replaced
    state, surgery = _without_surgery(state)
    with Undo(*remembered.options.snapshot()):
        if surgery is not None:
            remembered.load_state_dict(surgery)
        load(optimizer.optimizer, state)
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _with_surgery(state: Mapping[str, Any], surgery: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state with that of its surgery, as the entry "surgery" and within the first group.

    ``torch.distributed.checkpoint`` keeps the states of parameters and the groups, and drops other entries. In the
    group are the bytes of a file, because it loads tensors into those of the new run, which has none before its first
    step.
    """
    groups = [dict(group) for group in state.get("param_groups", ())]
    if groups:
        file = BytesIO()
        torch.save(surgery, file)
        groups[0]["surgery"] = file.getvalue()
    return {**state, "param_groups": groups, "surgery": surgery}


def _without_surgery(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Return the optimizer's part of what :func:`_with_surgery` returns, and the surgery's; None if it has none."""
    state = dict(state_dict)
    surgery, groups = state.pop("surgery", None), state.get("param_groups")
    if isinstance(groups, Sequence) and all(isinstance(group, Mapping) for group in groups):
        state["param_groups"] = [{k: v for k, v in group.items() if k != "surgery"} for group in groups]
        files = [group["surgery"] for group in groups if "surgery" in group]
        if surgery is None and files:
            surgery = torch.load(BytesIO(files[0]), map_location="cpu")
    return state, surgery


def load(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load an optimizer's state. If that raises, its state and groups are as before.

    Raises:
        TypeError, ValueError: the state has another form than those of torch's optimizers, which the optimizer loads.
    """
    check_mapping(state)
    if type(optimizer).load_state_dict is Optimizer.load_state_dict:
        check_state(state)
    with Undo(_state_of(optimizer)):
        optimizer.load_state_dict(dict(state))


def _state_of(optimizer: Optimizer) -> PutBack:
    """Keep an optimizer's state and groups, in whose place torch puts those that it loads."""
    state, groups = optimizer.state, optimizer.param_groups

    def put_back() -> None:
        if optimizer.state is not state or optimizer.param_groups is not groups:
            optimizer.state, optimizer.param_groups = state, groups

    return put_back


def restored(
    kind: Callable[..., Any],
    optimizer: Optimizer,
    options: Options,
    step_scale: Tensor | None,
    untracked: Untracked,
) -> Any:
    """Return the SurgeryOptimizer, or a class derived from it, that ``pickle`` or ``copy`` restores.

    Args:
        kind: the class.
        optimizer: the wrapped optimizer.
        options: the options of its steps.
        step_scale: κ that waits for a step, or None.
        untracked: as its attribute.
    """
    made = kind(
        optimizer,
        options.aggregator,
        groups=options.groups,
        shared=options.shared,
        suppression=options.suppression,
        conflict_lr=options.conflict_lr,
        process_group=options.process_group,
        shard_optimizer=options.shard_optimizer,
        **vars(options.way),
    )
    made._memory = options.memory
    made._pending.step_scale = step_scale
    made._untracked = untracked
    return made
