"""PCGrad and GradVac with the interface of anzeyimana/Pytorch-PCGrad-GradVac-AMP-GradAccum: only the import changes.

``backward`` adds each task's gradient to that task's row, from micro-batch to micro-batch. ``step`` does the surgery of
the rows, lets the scaler unscale the result and step, and drops the rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradkern import aggregators
from gradkern.arguments import boolean, instance, integer, number, shown, tensor
from gradkern.compat.losses import listed
from gradkern.gradients.accumulation import Accumulation
from gradkern.gradients.losses import Loss, Losses, Pass, losses_named
from gradkern.gradients.parameters import parameters
from gradkern.ops.dtypes import DTYPES
from gradkern.ops.undo import Undo
from gradkern.optim.arguments import check_mapping
from gradkern.optim.checkpoint import load
from gradkern.optim.undo import grads_of, stage_of, undone_if_skipped
from gradkern.optim.wrapper import refuse_wrapper
from gradkern.step.backward import add_up
from gradkern.step.options import Options
from gradkern.step.pipeline import run
from gradkern.step.sinks import GradSink


class _Accumulating:
    """Base of both classes. ``method`` does the surgery; the other arguments are those of the two classes."""

    def __init__(
        self,
        num_tasks: int,
        optimizer: Optimizer,
        method: aggregators.Aggregator,
        scaler: torch.amp.GradScaler | None,
        cpu_offload: bool,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        refuse_wrapper(optimizer)
        if scaler is not None:
            instance("scaler", scaler, torch.amp.GradScaler, "a torch.amp.GradScaler or None")
        boolean("cpu_offload", cpu_offload)
        self.num_tasks = integer("num_tasks", num_tasks, 1)
        self.cpu_offload = cpu_offload
        self._optimizer = optimizer
        self._method = method
        self._scaler = scaler
        self._forget()
        parameters(self._params())

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer that takes the step. Schedulers take it."""
        return self._optimizer

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The scaler of the losses, or None."""
        return self._scaler

    def backward(self, mt_losses: Sequence[Loss] | Tensor) -> None:
        """Add the gradient of each task's loss to that task's row. The graphs are freed, and ``.grad`` does not change.

        Args:
            mt_losses: ``num_tasks`` entries, as ``losses`` in :func:`gradkern.backward`. Divide them by the number of
                micro-batches to get the mean over micro-batches. Or a tensor (``num_tasks``,) that holds all losses.
                Through it every loss reaches all heads, most of them with zeros, so that heads count as shared
                parameters.

        Raises:
            TypeError, ValueError: as :func:`gradkern.backward`.
            RuntimeError: an earlier call raised halfway, and ``zero_grad`` was not called since.
        """
        losses = listed("mt_losses", mt_losses)
        if len(losses) != self.num_tasks:
            raise ValueError(f"mt_losses must have num_tasks={self.num_tasks} entries, got {len(losses)}")
        with losses_named("mt_losses"):
            self._add_up(losses)

    def _add_up(self, losses: Sequence[Loss]) -> None:
        scaled = [self._scaled(loss) for loss in losses]
        if self.cpu_offload:
            self._add_hosts(switching=any(map(callable, losses)))
            add_up(self._rows, _ToHost(scaled, list(self._hosts)), list(self._hosts.values()))
        else:
            add_up(self._rows, Losses(scaled, retain_graph=False), self._params())

    def step(self) -> None:
        """Replace ``.grad`` by the surgery of the rows, drop the rows, step, and clear ``.grad``.

        If it raises, the rows are lost. Every ``.grad``, the method's targets and the scaler's record of the step are
        as before. What the optimizer has changed by then, parameters and its state, cannot be taken back.

        Raises:
            RuntimeError: ``backward`` was not called since the last step or ``zero_grad``, or a call raised halfway.
        """
        self._rows.check()
        if not any(self._rows.present):
            raise RuntimeError("step() without a backward() before it: there are no gradients to step along")
        optimizer, params = self._optimizer, self._params()
        state = self._method.snapshot()
        skipped = undone_if_skipped(self._scaler, optimizer, [state])
        with Undo(state, grads_of(params, changed=False), stage_of(self._scaler, optimizer)), skipped:
            for p in params:
                p.grad = None
            try:
                self._write_grads()
            finally:
                self._forget()
            if self._scaler is None:
                optimizer.step()
            else:
                self._scaler.step(optimizer)
                self._scaler.update()
            optimizer.zero_grad()

    def _write_grads(self) -> None:
        """Write the surgery of the rows to ``.grad``; the rows are used up by it."""
        params = list(self._hosts.values()) if self.cpu_offload else self._params()
        run(self._rows, GradSink(), Options(self._method), params)
        for p, host in self._hosts.items():
            p.grad = None if host.grad is None else host.grad.to(p.device)

    def zero_grad(self) -> None:
        """Drop the rows and clear ``.grad``."""
        self._optimizer.zero_grad()
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the "optimizer" and of the "scaler", in the original's format. Rows are not in it."""
        state: dict[str, Any] = {"optimizer": self._optimizer.state_dict()}
        if self._scaler is not None:
            state["scaler"] = self._scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that :meth:`state_dict` returned, here or in the original.

        Raises:
            TypeError, ValueError: an entry is missing or does not fit. Nothing has been loaded then.
        """
        check_mapping(state_dict)
        for name in self.state_dict():
            if name not in state_dict:
                raise ValueError(f"state_dict must hold {name!r}, got {shown(list(state_dict))}")
        if self._scaler is not None:
            _check_scaler_state(state_dict["scaler"], self._scaler)
        load(self._optimizer, state_dict["optimizer"])
        if self._scaler is not None:
            self._scaler.load_state_dict(state_dict["scaler"])

    def _forget(self) -> None:
        self._rows = Accumulation()
        self._hosts: dict[Tensor, Tensor] = {}

    def _params(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _add_hosts(self, switching: bool) -> None:
        """Add a stand-in on the host for each trained parameter. Its rows belong to it; its values are not read.

        Args:
            switching: whether callables may train parameters that are frozen here.
        """
        for p in self._params():
            if p not in self._hosts and (p.requires_grad or (switching and p.dtype in DTYPES)):
                self._hosts[p] = torch.empty_like(p, device="cpu", requires_grad=True)

    def _scaled(self, loss: Loss) -> Loss:
        scaler = self._scaler
        if scaler is None or loss is None:
            return loss
        if callable(loss):
            return lambda: scaler.scale(loss())
        return scaler.scale(loss) if isinstance(loss, Tensor) else loss  # Losses refuses anything else


class PCGradAMP(_Accumulating):
    """Runs PCGrad over micro-batches and under a scaler.

    Make it by ``opt = PCGradAMP(3, optimizer, scaler)``, call ``opt.backward(losses)`` for each micro-batch, then
    ``opt.step()``.

    The method is :class:`gradkern.PCGrad`. A head that one task reaches gets that task's gradient and has no part in
    the dot products, which are float32 at least. No gradient is projected onto its own task's gradient. The orders come
    from torch's generator. A parameter that no task reaches gets no ``.grad``.

    Args:
        num_tasks: T.
        optimizer: takes the step, over leaf tensors as in :func:`gradkern.backward`. Schedulers take it, too.
        scaler: scales the losses. A step that is not finite is skipped, and the scale backs off.
        reduction: of the modified task gradients, "sum" or "mean".
        cpu_offload: True to keep the rows in host memory and do the surgery there. The device then holds the gradients
            of one task at a time, and in the end their combination. Post-accumulate hooks do not run then.

    Raises:
        TypeError, ValueError: an argument is not as said above.
    """

    def __init__(
        self,
        num_tasks: int,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler | None = None,
        reduction: str = "sum",
        cpu_offload: bool = False,
    ) -> None:
        super().__init__(num_tasks, optimizer, aggregators.PCGrad(reduction=reduction), scaler, cpu_offload)


class GradVacAMP(_Accumulating):
    """Runs GradVac over micro-batches and under a scaler, as :class:`PCGradAMP` runs PCGrad.

    Make it by ``opt = GradVacAMP(3, optimizer, device, scaler)``. The method is :class:`gradkern.GradVac`. Each visit
    moves the target of its pair, up or down, as in the paper. A step with a dot product that is not finite moves no
    target. Nor does a step that the scaler skips because of an overflow in a head alone, unless the optimizer takes the
    scale itself, as fused ones do.

    Args:
        num_tasks: T.
        optimizer: as for :class:`PCGradAMP`.
        DEVICE: ignored, since the tensors know their device.
        scaler: as for :class:`PCGradAMP`.
        beta: how far a target moves toward the cosine in a step, from 0 to 1.
        reduction: as for :class:`PCGradAMP`.
        cpu_offload: as for :class:`PCGradAMP`.

    Raises:
        TypeError, ValueError: an argument is not as said above.
    """

    def __init__(
        self,
        num_tasks: int,
        optimizer: Optimizer,
        DEVICE: torch.device | str | int | None,
        scaler: torch.amp.GradScaler | None = None,
        beta: float = 1e-2,
        reduction: str = "sum",
        cpu_offload: bool = False,
    ) -> None:
        _check_device(DEVICE)
        self._vaccine = aggregators.GradVac(beta=beta, reduction=reduction)
        super().__init__(num_tasks, optimizer, self._vaccine, scaler, cpu_offload)

    @property
    def rho_T(self) -> Tensor:
        """A copy of the cosines that GradVac aims at, (T, T) float64."""
        targets = self._vaccine.targets
        if targets is None:
            return torch.zeros((self.num_tasks,) * 2, dtype=torch.float64, device="cpu")
        return targets[0].clone()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the "optimizer" and the "scaler", and "rho_T". Rows are not in it."""
        return super().state_dict() | {"rho_T": self.rho_T}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that :meth:`state_dict` returned, here or in the original.

        A target that is not finite, as the original may hold, starts from 0 again.

        Raises:
            TypeError, ValueError: an entry is missing or does not fit. Nothing has been loaded then.
        """
        check_mapping(state_dict)
        rho = tensor("rho_T in state_dict", state_dict.get("rho_T", self.rho_T))
        if not rho.is_floating_point():
            raise TypeError(f"rho_T in state_dict must be floating, got {rho.dtype}")
        if rho.shape != self.rho_T.shape:
            raise ValueError(f"rho_T in state_dict must be of shape {tuple(self.rho_T.shape)}, got {tuple(rho.shape)}")
        targets = torch.where(rho.isfinite(), rho.double(), 0.0).unsqueeze(0)
        with Undo(self._vaccine.snapshot()):
            self._vaccine.load_state_dict({"targets": targets, "_extra_state": None})
            super().load_state_dict(state_dict)


def _check_device(device: object) -> None:
    """Raise TypeError or ValueError unless ``device``, the argument ``DEVICE``, names a device or is None."""
    wanted = f"DEVICE must be a torch.device, the name of one, or None, got {shown(device)}"
    if not (device is None or isinstance(device, (str, int, torch.device))):
        raise TypeError(wanted)
    try:
        torch.device(device or "cpu")
    except RuntimeError as error:
        raise ValueError(wanted) from error


def _check_scaler_state(state: object, scaler: torch.amp.GradScaler) -> None:
    """Raise unless a state has the numbers that the scaler loads: none if it is disabled."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state_dict['scaler'] must be a dictionary, got {shown(state)}")
    for name in scaler.state_dict():
        if name not in state:
            raise ValueError(f"state_dict['scaler'] must hold {name!r}, got {shown(list(state))}")
        number(f"{name} in state_dict['scaler']", state[name])


class _ToHost(Losses):
    """Hands out the gradients of losses by ``on_device`` in host memory, for the stand-in parameters there."""

    def __init__(self, losses: Sequence[Loss], on_device: Sequence[Tensor]) -> None:
        super().__init__(losses, retain_graph=False)
        self.on_device = on_device

    def open(self, device: torch.device) -> None:
        """Check the losses. They are on the device of the parameters that they reach."""
        super().open(self.on_device[0].device)

    def passes(self, targets: Sequence[Tensor], keep: bool = True) -> Iterator[Pass]:
        """Run :meth:`Losses.passes` on the device."""
        for i, grads in super().passes(self.on_device, keep):
            row = [None if g is None else g.cpu() for g in grads]
            del grads  # so that the device never holds two tasks' gradients
            value = self.values[i]
            assert value is not None
            self.values[i] = value.cpu()
            yield i, row
