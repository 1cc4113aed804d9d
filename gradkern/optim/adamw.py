"""AdamW in one pass, also along a combination of task gradients, which then goes to no memory of its own.

A plain step is one along the only row there is, with weight 1.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradkern import rows
from gradkern.ops import direct
from gradkern.ops.schema import DTYPES, arithmetic_dtype
from gradkern.rows import Column
from gradkern.suppression import Mask

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


@dataclass
class Combination:
    """What a step goes along: Σ_t w[segment, t] g_t of each column.

    Attributes:
        columns: dense, with the strides of their parameters.
        w: (S + 1, T), the weights of each group, and of what is outside surgery.
        mask: what it drops becomes 0.
        lr_scale: (), by which the learning rate is multiplied; None for 1.
        found_inf: (), not 0 where the step is to change nothing; None for 0.
        kept: (), how many entries the mask kept, once the step has been taken; None without one.
    """

    columns: Sequence[Column]
    w: Tensor
    mask: Mask | None = None
    lr_scale: Tensor | None = None
    found_inf: Tensor | None = None
    kept: Tensor | None = None


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW(fused=True), which :meth:`SurgeryOptimizer.update` steps with no ``.grad`` in between.

    On ``.grad`` it works as torch's does. Moments are float32, of float64 parameters float64: those of bfloat16 and
    float16 parameters lose nothing, and :meth:`load_state_dict` takes those of torch's, in whichever dtype. Its
    ``state_dict`` loads into torch's. All that a step needs is on the device, so that it can be captured in a CUDA
    graph; then a learning rate that changes must be a tensor, as torch says of ``capturable``.

    Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization".

    Args:
        params: tensors, (name, tensor) pairs or groups of them; float32, float64, bfloat16 or float16.
        lr: learning rate, a float or a tensor of one element.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: times ``lr``, the share by which a step shrinks parameters.
        amsgrad: divide by the largest second moment so far (Reddi et al. 2018).
        maximize: step towards larger losses.
        foreach: None or False; the step is fused.
        capturable: as torch's; makes no difference here.
        differentiable: False.
        fused: None or True.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        if foreach:
            raise ValueError(f"foreach must be None or False, got {foreach!r}: the step is fused")
        if differentiable:
            raise ValueError(f"differentiable must be False, got {differentiable!r}: the step is fused")
        if fused is not None and not fused:
            raise ValueError(f"fused must be None or True, got {fused!r}: torch.optim.AdamW is what is not")
        if any(isinstance(beta, Tensor) for beta in betas):
            raise ValueError(f"betas must be floats, got {betas!r}")
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, capturable=capturable, fused=True
        )
        self.combination: Combination | None = None
        """What the next step goes along, in place of ``.grad``."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """A step along ``.grad``.

        Args:
            closure: computes the loss anew, and is returned of.

        Raises:
            TypeError: a gradient is sparse, or of a dtype that a moment's does not hold. Nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        along, self.combination = self.combination or self._gradients(), None
        self._take(along)
        return loss

    def _gradients(self) -> Combination:
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        row = rows.readable([p.grad for p in params], params)
        columns = rows.columns(params, [row], [None] * len(params), [-1] * len(params), overwrite=False)
        w = torch.ones((1, 1), dtype=torch.float32, device=params[0].device if params else None)
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)  # of a GradScaler, as is found_inf
        return Combination(
            columns, w if grad_scale is None else w / grad_scale, found_inf=getattr(self, "found_inf", None)
        )

    def _take(self, along: Combination) -> None:
        columns = {c.param: c for c in along.columns}
        batches: dict[tuple[Any, ...], list[Column]] = defaultdict(list)
        for i, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p in columns:
                    _check(columns[p])
                    batches[i, p.dtype, columns[p].dtype].append(columns[p])
        for (i, *_), batch in batches.items():
            kept = self._take_batch(self.param_groups[i], batch, along)
            if kept is not None:
                along.kept = kept if along.kept is None else along.kept + kept

    def _take_batch(self, group: dict[str, Any], batch: list[Column], along: Combination) -> Tensor | None:
        params = [c.param for c in batch]
        states = [self._state_of(p, group["amsgrad"]) for p in params]
        steps = [state["step"] for state in states]
        moments = [state[name] for name in MOMENTS[: 3 if group["amsgrad"] else 2] for state in states]
        torch._foreach_add_(steps, 1.0 if along.found_inf is None else (along.found_inf == 0).float())
        w = (-along.w if group["maximize"] else along.w).to(moments[0].dtype)
        lr, lr_scale = group["lr"], along.lr_scale
        if isinstance(lr, Tensor):
            lr_scale = lr.reshape(()).to(params[0].device) if lr_scale is None else lr.reshape(()) * lr_scale
            lr = 1.0
        segments = [len(w) - 1 if c.segment is None else c.segment for c in batch]
        numbers = [lr, *group["betas"], group["weight_decay"], group["eps"]]
        step = (params, moments, steps, along.found_inf, lr_scale, [float(number) for number in numbers])
        if along.mask is None:
            direct.adamw(rows.row_major(batch), w, segments, *step)
            return None
        units = [c.unit for c in batch]
        return direct.adamw_masked(rows.row_major(batch), w, segments, units, along.mask.block, along.mask.words, *step)

    def _state_of(self, p: Tensor, amsgrad: bool) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for name in MOMENTS[: 3 if amsgrad else 2]:
            if name not in state:
                state[name] = torch.zeros_like(p, dtype=arithmetic_dtype(p.dtype))
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a ``state_dict`` of this optimizer or of torch.optim.AdamW, fused or not."""
        loaded: dict[str, Any] = {}
        handle = self.register_load_state_dict_pre_hook(lambda _, seen: loaded.update(seen))  # after others' hooks
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        numbers = [number for group in loaded["param_groups"] for number in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, params, strict=True):
            # torch has put the moments into the parameter's dtype, and left the step of a plain step on the CPU.
            for name, value in loaded["state"].get(number, {}).items():
                dtype = torch.float32 if name == "step" else arithmetic_dtype(p.dtype)
                self.state[p][name] = value.detach().to(p.device, dtype, copy=True)
        for group in self.param_groups:
            group.update(fused=True, foreach=None, differentiable=False)


def _check(c: Column) -> None:
    """Raise unless a step can be taken along the column."""
    name = f"the gradient of a parameter of shape {tuple(c.param.shape)}"
    if c.sparse:
        raise TypeError(f"{name} is sparse, which AdamW does not support: torch.optim.SparseAdam does")
    if c.param.dtype not in DTYPES or arithmetic_dtype(c.dtype) != arithmetic_dtype(c.param.dtype):
        raise TypeError(f"{name} is {c.dtype} and the parameter {c.param.dtype}, which AdamW cannot step together")
