"""Any torch optimizer with gradient surgery in its backward pass."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gradkern import graph
from gradkern.aggregators import Aggregator
from gradkern.backward import backward
from gradkern.info import SurgeryInfo
from gradkern.losses import Loss
from gradkern.parameters import Groups, Params, parameters, segments, subset


class SurgeryOptimizer(Optimizer):
    """Wraps a torch optimizer: ``opt.zero_grad(); opt.backward(losses); opt.step()``.

    It is an optimizer for schedulers, gradient scalers and hooks, and its ``param_groups``, ``state`` and ``defaults``
    are the wrapped optimizer's own. Its ``state_dict`` is the wrapped optimizer's with one more entry, "surgery"; a
    plain optimizer's checkpoint loads too, and a plain optimizer loads this one's.

    Args:
        optimizer: the optimizer that takes the step, over leaf tensors as in :func:`gradkern.backward`. Give it
            ``model.named_parameters()`` where ``groups`` needs names.
        aggregator: the method, such as ``gradkern.PCGrad()``.
        groups: as in :func:`gradkern.backward`.
        shared: as in :func:`gradkern.backward`.
    """

    # A scaler would hand its scale to this optimizer, and the wrapped one would step scaled gradients.
    _step_supports_amp_scaling = False

    def __init__(
        self, optimizer: Optimizer, aggregator: Aggregator, *, groups: Groups = "model", shared: Params | None = None
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if not isinstance(aggregator, Aggregator):
            raise TypeError(f"aggregator must be a gradkern.Aggregator, got {aggregator!r}")
        # torch's own __init__ sets up the hooks and writes fresh groups and state: let it write them to a stand-in.
        self.optimizer: Any = SimpleNamespace(add_param_group=lambda group: None)
        super().__init__([{"params": []}], {})
        self.optimizer = optimizer
        self.aggregator = aggregator
        self.groups = groups
        # An iterator serves once, and every step asks again.
        self.shared = list(shared) if isinstance(shared, Iterator) else shared
        self._first = True  # the step in which to look for parameters outside
        given = parameters(self._params())
        segments(given, groups)
        if self.shared is not None:
            subset(self.shared, given)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's parameter groups."""
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        return groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def state(self) -> Any:
        """The wrapped optimizer's state."""
        return self.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's defaults."""
        defaults: dict[str, Any] = self.optimizer.defaults
        return defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.optimizer.defaults = value

    def backward(self, losses: Sequence[Loss], *, retain_graph: bool = False) -> SurgeryInfo:
        """:func:`gradkern.backward` on the optimizer's parameters: accumulates the surgery's result into ``.grad``.

        Args:
            losses: one entry per task, as in :func:`gradkern.backward`.
            retain_graph: keep the graphs for another backward pass.
        """
        outside: dict[Tensor, None] = {}
        if self._first and isinstance(losses, Iterable) and not isinstance(losses, Tensor):
            losses = [self._watched(loss, outside) for loss in losses]
        info = backward(
            losses,
            self._params(),
            aggregator=self.aggregator,
            groups=self.groups,
            shared=self.shared,
            retain_graph=retain_graph,
        )
        self._first = False
        if outside:
            shapes = ", ".join(str(tuple(p.shape)) for p in list(outside)[:5])
            warnings.warn(
                f"the losses reach {len(outside)} tensor(s) that require grad and are not in the optimizer; they get "
                f"no .grad. Shapes: {shapes}",
                UserWarning,
                stacklevel=2,
            )
        return info

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step of the wrapped optimizer; ``closure`` is passed on to it."""
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as the wrapped optimizer does."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the wrapped optimizer; their surgery starts fresh."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's ``state_dict`` and, under "surgery", the method's name and state."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state: dict[str, Any] = dict(self.optimizer.state_dict())
        state["surgery"] = {"method": type(self.aggregator).__name__, "state": dict(self.aggregator.state_dict())}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, state)
            state = state if replaced is None else replaced
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, or a plain optimizer's, which leaves the method's state as it is.

        Raises:
            ValueError: the checkpoint is of another method, or its state does not fit this one. Nothing has been loaded
                then.
        """
        state = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state)
            state = state if replaced is None else replaced
        surgery = state.pop("surgery", None)
        before = self.aggregator.state_dict()
        if surgery is not None:
            self._load_method(surgery)
        try:
            self.optimizer.load_state_dict(state)
        except Exception:
            self.aggregator.load_state_dict(before)
            raise
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _load_method(self, surgery: Any) -> None:
        method = type(self.aggregator).__name__
        if not isinstance(surgery, dict) or set(surgery) != {"method", "state"}:
            raise ValueError(f"state_dict['surgery'] must hold 'method' and 'state', got {surgery!r}")
        if surgery["method"] != method:
            raise ValueError(f"state_dict is of a step with {surgery['method']}, this optimizer's method is {method}")
        self.aggregator.load_state_dict(surgery["state"])

    def __repr__(self) -> str:
        return f"SurgeryOptimizer({self.optimizer!r}, {self.aggregator!r}, groups={self.groups!r})"

    def __reduce__(self) -> tuple[Any, ...]:  # torch's own keeps groups and state only
        return _made, (type(self), self.optimizer, self.aggregator, self.groups, self.shared)

    def _params(self) -> list[Any]:
        entries: list[Any] = []
        for group in self.param_groups:
            names = group.get("param_names")
            entries += group["params"] if names is None else zip(names, group["params"], strict=True)
        return entries

    def _watched(self, loss: Loss, outside: dict[Tensor, None]) -> Loss:
        """``loss``; what it would have trained besides, had ``backward`` been torch's own, is put into ``outside``."""
        inside = {p for group in self.param_groups for p in group["params"]}

        def watch(value: object) -> None:
            if isinstance(value, Tensor) and value.requires_grad:
                outside.update((p, None) for p in graph.leaves(value) if p not in inside)

        if loss is None or not callable(loss):
            watch(loss)
            return loss

        def watched() -> Tensor:
            value = loss()
            watch(value)
            return value

        return watched


def _made(kind: type[SurgeryOptimizer], optimizer: Optimizer, method: Aggregator, groups: Any, shared: Any) -> Any:
    return kind(optimizer, method, groups=groups, shared=shared)
