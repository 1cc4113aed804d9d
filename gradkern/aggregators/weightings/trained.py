"""Weightings that the user's optimizer trains: Uncertainty (Kendall et al. 2018) and IMTLL (Liu et al. 2021)."""

import torch
from torch import Tensor, nn

from gradkern.aggregators.base import OwnGrads
from gradkern.aggregators.weightings.scalarization import Scalarization, Tasks
from gradkern.arguments import integer


class Trained(Scalarization):
    """A scalarization with one parameter s of T numbers, zeros at first, for the user's optimizer to train.

    The sum over the present tasks of an objective f(L_i, s_i) is what is minimised: ∂f/∂L_i weighs loss i, and ∂f/∂s_i
    is added to the ``.grad`` of s in each step, if the step's ``params`` hold s. Otherwise a step warns, once.

    Args:
        T: the number of tasks.
        report: as for :class:`Scalarization`.
    """

    needs_losses = True
    is_trained = True

    def __init__(self, T: int, report: bool = False) -> None:
        super().__init__(report)
        self.T = integer("T", T, least=1)

    def _s(self) -> nn.Parameter:
        (s,) = self.parameters()
        return s

    def _numbers(self, tasks: Tasks) -> Tensor:
        """Return s as (T,) float64; raise ValueError if the tasks' number or device is another one."""
        if tasks.count != self.T:
            raise ValueError(f"T is {self.T} in {self!r}, but the step has {tasks.count} tasks")
        s = self._s()
        if s.device != tasks.device and tasks.device.type != "meta":
            raise ValueError(f"the parameter of {self!r} is on {s.device}, the losses on {tasks.device}: move it there")
        return s.detach().to(tasks.device, torch.float64)

    def _own(self, tasks: Tasks, grads: Tensor) -> OwnGrads:
        """Return s with its gradient, 0 for absent tasks."""
        s = self._s()
        return ((s, tasks.among_present(grads, 0.0).to(s.dtype)),)

    def __repr__(self) -> str:
        return self._repr_of(f"T={self.T}")


class Uncertainty(Trained):
    """Uncertainty weighting of Kendall et al. 2018: it minimises Σ ½ L_i e^(−s_i) + ½ s_i over the model and s.

    s_i is the log-variance of task i's noise. Give it to the optimizer:
    ``torch.optim.AdamW([*model.parameters(), *method.parameters()])``.

    Args:
        T: as for :class:`Trained`.
        report: as for :class:`Scalarization`.

    Attributes:
        log_variances: (T,), s; zeros at first, so that each weight is ½.
    """

    def __init__(self, T: int, report: bool = False) -> None:
        super().__init__(T, report)
        self.log_variances = nn.Parameter(torch.zeros(self.T, device="cpu"))

    def weigh(self, tasks: Tasks) -> Tensor:
        """Return ½ e^(−s_i)."""
        return self._numbers(tasks).neg().exp() / 2

    def observe(self, tasks: Tasks) -> OwnGrads:
        """Return ½ − ½ L_i e^(−s_i)."""
        return self._own(tasks, (1 - tasks.known() * self._numbers(tasks).neg().exp()) / 2)


class IMTLL(Trained):
    """IMTL-L, the loss balance of Liu et al. 2021: it minimises Σ e^(s_i) L_i − s_i over the model and s.

    At the optimum of s all weighted losses e^(s_i) L_i are 1. The losses must be positive on average, since otherwise s
    grows without bound. Give s to the optimizer: ``torch.optim.AdamW([*model.parameters(), *method.parameters()])``.

    Args:
        T: as for :class:`Trained`.
        report: as for :class:`Scalarization`.

    Attributes:
        log_scales: (T,), s; zeros at first, so that each weight is 1.
    """

    def __init__(self, T: int, report: bool = False) -> None:
        super().__init__(T, report)
        self.log_scales = nn.Parameter(torch.zeros(self.T, device="cpu"))

    def weigh(self, tasks: Tasks) -> Tensor:
        """Return e^(s_i)."""
        return self._numbers(tasks).exp()

    def observe(self, tasks: Tasks) -> OwnGrads:
        """Return e^(s_i) L_i − 1."""
        return self._own(tasks, self._numbers(tasks).exp() * tasks.known() - 1)
