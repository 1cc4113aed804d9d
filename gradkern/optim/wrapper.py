"""A torch optimizer that wraps another one and shares its groups, state and defaults."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class OptimizerWrapper(Optimizer):
    """Wraps a torch optimizer; schedulers, gradient scalers and hooks accept it as an optimizer.

    Public attributes that it lacks are read from the wrapped optimizer: ``train`` and ``eval`` of a schedule-free one,
    ``first_step`` of SAM. To set one, use ``optimizer``.

    Args:
        optimizer: the wrapped optimizer.

    Raises:
        TypeError: ``optimizer`` is not a torch.optim.Optimizer, or is such a wrapper itself.
    """

    # Otherwise a scaler would pass its scale to this optimizer, and the wrapped one would step scaled gradients.
    _step_supports_amp_scaling = False

    def __init__(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        refuse_wrapper(optimizer)
        # torch's __init__ sets up the hooks. It also writes new groups and state, which placeholders take.
        self.optimizer: Any = SimpleNamespace()
        self.add_param_group = lambda param_group: None  # type: ignore[method-assign]
        super().__init__([{"params": []}], {})
        del self.add_param_group
        self.optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        """Return a public attribute of the wrapped optimizer; Python asks for those that this one lacks."""
        inner = self.__dict__.get("optimizer")  # missing in a copy that is being made
        if name.startswith("_") or inner is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(inner, name)

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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as the wrapped optimizer does."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)

    def _inner_step(self, closure: Callable[[], float] | None) -> Any:
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    def _tensors(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _params(self) -> list[Any]:
        """Return the parameters, with their names if the wrapped optimizer has names."""
        entries: list[Any] = []
        for group in self.param_groups:
            names = group.get("param_names")
            entries += group["params"] if names is None else zip(names, group["params"], strict=True)
        return entries


def refuse_wrapper(optimizer: Optimizer) -> None:
    """Raise TypeError if an optimizer to be wrapped does surgery itself, because its state would be lost."""
    if isinstance(optimizer, OptimizerWrapper):
        raise TypeError(
            f"optimizer must not do surgery itself, got {type(optimizer).__name__}: give the optimizer within, its "
            "attribute optimizer"
        )
