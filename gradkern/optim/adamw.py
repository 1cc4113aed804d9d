"""AdamW in one pass, also along a combination of task gradients, which it never stores.

A step along ``.grad`` is a combination of a single row with weight 1.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradkern.arguments import listed, shown
from gradkern.distributed.by_rows import ByRows
from gradkern.gradients.layouts import layouts_of, new_grad_stride
from gradkern.gradients.param_grads import readable
from gradkern.gradients.plan import Batch, Column, arranged
from gradkern.gradients.sharded import parts_here
from gradkern.ops import operators
from gradkern.ops.arguments import AdamWState, AdamWStep, TaskGrads
from gradkern.ops.dtypes import arithmetic_dtype
from gradkern.optim.adamw_arguments import adamw_options, check_adamw_state, check_dtype, refuse_unfused, state_entry
from gradkern.optim.arguments import check_closure, check_mapping, checked_group
from gradkern.optim.moments import MOMENTS, states_of
from gradkern.step.flat_rows import FlatRows
from gradkern.step.masked import mask_over
from gradkern.step.rows import Rows
from gradkern.step.step_rows import StepRows


@dataclass
class Combination:
    """The direction of a step: Σ_t w[segment, t] g_t of each column.

    Attributes:
        rows: the gradients, dense, with the strides of their parameters; and the mask, which sets entries to 0.
        w: (S + 1, T), the weights of each group, and of unshared parameters.
        lr_scale: (), a factor of the learning rate; None for 1.
        found_inf: (), not 0 if the step must change nothing; None for 0.
        kept: (), the number of entries that the mask kept, after the step; None without a mask.
    """

    rows: StepRows
    w: Tensor
    lr_scale: Tensor | None = None
    found_inf: Tensor | None = None
    kept: Tensor | None = None


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW(fused=True), which :meth:`SurgeryOptimizer.update` steps without writing ``.grad``.

    With ``.grad`` it works as torch's AdamW does. Moments are float64 for float64 parameters and float32 for all
    others, so those of bfloat16 and float16 parameters lose nothing. :meth:`load_state_dict` accepts torch's moments in
    any dtype, and torch's AdamW loads this ``state_dict``. All that a step needs is on the device, so a CUDA graph can
    capture it; then a learning rate that changes must be a tensor, as for torch's ``capturable``.

    Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization".

    Args:
        params: tensors, (name, tensor) pairs or groups of them; float32, float64, bfloat16 or float16.
        lr: the learning rate, a float or a tensor of one element.
        betas: the decay rates of the two moments.
        eps: the number added to the root of the second moment.
        weight_decay: the share by which a step shrinks parameters, times ``lr``.
        amsgrad: whether to divide by the largest second moment so far (Reddi et al. 2018).
        maximize: whether to step towards larger losses.
        foreach: None or False; the step is fused.
        capturable: as for torch's AdamW; it changes nothing here.
        differentiable: False.
        fused: None or True.

    Raises:
        TypeError, ValueError: an argument is not as said above. Numbers are finite and 0 at least; betas are below 1.
    """

    # A class attribute, because copies are made without __init__.
    combination: Combination | None = None
    """The direction of the next step, in place of ``.grad``; :meth:`check` has accepted its columns."""
    by_rows: ByRows | None = None
    """The cut of the moments among ranks; None if each has them whole. Directions are of this rank's rows then."""

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
        refuse_unfused({"foreach": foreach, "differentiable": differentiable, "fused": fused})
        numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        flags = {"amsgrad": amsgrad, "maximize": maximize, "capturable": capturable}
        entries = listed("params", params, "tensors, (name, tensor) pairs or groups of them")
        if not entries:
            raise ValueError(f"params is empty: {shown(params)}")
        super().__init__(entries, **adamw_options(numbers | flags), fused=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with hyperparameters of their own.

        Args:
            param_group: a dictionary that holds "params", tensors or (name, tensor) pairs, and any hyperparameters that
                differ from the optimizer's.

        Raises:
            TypeError, ValueError: ``param_group`` is not as said above. Nothing has changed then.
        """
        added = checked_group(param_group)
        for k, p in enumerate(added.tensors):
            if p.requires_grad:
                check_dtype(added.name(k), p)
        refuse_unfused(param_group)
        adamw_options(param_group)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Take a step along ``.grad``.

        Args:
            closure: recomputes the loss, which the step returns.

        Raises:
            TypeError: ``closure`` cannot be called, a gradient is sparse, or its dtype does not fit the parameter's.
            ValueError: there are gaps between a parameter's numbers, or its state has another shape. Nothing has
                changed in either case.
        """
        loss = None
        check_closure(closure)
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        direction, self.combination = self.combination or self._from_grad(), None
        if direction is not None:
            self._step_along(direction)
        return loss

    def check(self, rows: StepRows) -> None:
        """Raise the errors of :meth:`step` unless it can step along ``rows``."""
        params = [rows.params[c.place] for c in rows.arrangement.columns]
        arrangement = _split(rows)[0].arrangement
        if not arrangement.steppable:
            for c in arrangement.columns:
                _check(c, rows.params[c.place])
            arrangement.steppable = True
        states = [(p, self.state[p]) for p in params if p in self.state]
        for name in MOMENTS:
            for p, state in states:
                if name in state and state[name].shape != p.shape:
                    raise ValueError(f"{_named(p)} has {name} of shape {tuple(state[name].shape)}")

    def _from_grad(self) -> Combination | None:
        """Return every ``.grad``, unscaled, as a combination of one row; None if there is no ``.grad``."""
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not params:
            return None
        rows = _one_row(params, readable([p.grad for p in params], params, layouts_of(params)))
        self.check(rows)
        if self.by_rows is not None:
            rows = replace(rows, grads=[self.by_rows.all_here(rows.grads[0], params)])
        direction = Combination(rows, _one(rows.device))
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)  # GradScaler sets this and found_inf
        if grad_scale is not None:
            direction.w = direction.w / grad_scale
        direction.found_inf = getattr(self, "found_inf", None)
        return direction

    def _step_along(self, direction: Combination) -> None:
        direction = _of_tensors(direction)
        rows, compact = _split(direction.rows)
        if compact is None:
            self._step_along_dense(direction)
            return
        self._step_along_dense(replace(direction, rows=rows))
        del rows
        assert isinstance(direction.rows, Rows)
        direction.rows.release()
        results, _ = compact.combine(direction.w[:-1], direction.w[-1])
        of_compact = along_parts([p for p, _ in results], [g for _, g in results])
        self._step_along_dense(replace(of_compact, lr_scale=direction.lr_scale, found_inf=direction.found_inf))

    def _step_along_dense(self, direction: Combination) -> None:
        rows = direction.rows
        numbers = {id(rows.params[c.place]): k for k, c in enumerate(rows.arrangement.columns)}
        batches: list[tuple[dict[str, Any], list[float], Batch]] = []
        for group in self.param_groups:
            by_kind: dict[tuple[torch.device, torch.dtype, torch.dtype], list[int]] = defaultdict(list)
            for p in group["params"]:
                k = numbers.get(id(p))
                if k is not None:
                    by_kind[p.device, p.dtype, rows.arrangement.columns[k].dtype].append(k)
            # Reading the hyperparameters may raise, so it comes before anything changes.
            batches += [
                (group, _numbers(group), rows.arrangement.chosen(tuple(of_kind))) for of_kind in by_kind.values()
            ]
        if rows.mask is not None:
            direction.kept = rows.mask.state.new_zeros(())
        for group, hyperparameters, batch in batches:
            self._step_batch(group, hyperparameters, batch, direction)
        if self.by_rows is not None:
            self.by_rows.gather([p for _, _, batch in batches for p in batch.of([rows.params])])

    def _step_batch(
        self, group: dict[str, Any], hyperparameters: list[float], batch: Batch, direction: Combination
    ) -> None:
        rows = direction.rows
        assert isinstance(rows, Rows)
        params: list[Tensor] = batch.of([rows.params])
        here = params if self.by_rows is None else self.by_rows.all_here(params, params)
        device = params[0].device
        names = MOMENTS[: 3 if group["amsgrad"] else 2]
        steps, moments = states_of([self.state[p] for p in params], params, names, self.by_rows)
        found_inf = None if direction.found_inf is None else direction.found_inf.to(device)
        _count(steps, 1.0 if found_inf is None else (found_inf == 0).float())
        w = (-direction.w if group["maximize"] else direction.w).to(device, moments[0].dtype)
        lr_scale = None if direction.lr_scale is None else direction.lr_scale.to(device)
        if isinstance(group["lr"], Tensor):
            lr = group["lr"].reshape(()).to(device)
            lr_scale = lr if lr_scale is None else lr * lr_scale
        operators.adamw(
            TaskGrads(parts_here(batch.of(rows.grads)), batch.segments, len(w)),
            w,
            AdamWState(parts_here(here), parts_here(moments), steps),
            AdamWStep(found_inf, lr_scale, hyperparameters),
            mask_over(batch.columns, rows.mask),
            direction.kept,
        )
        torch.autograd.graph.increment_version(params)  # for backward passes that have saved one

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a ``state_dict`` of this optimizer or of torch.optim.AdamW, fused or not.

        Raises:
            TypeError, ValueError: ``state_dict`` has another form, or does not fit. Nothing has changed then.
        """
        check_mapping(state_dict)
        kept: dict[Tensor, dict[str, Tensor]] = {}

        def keep(_: Any, loaded: dict[str, Any]) -> None:
            check_adamw_state(loaded)
            # torch converts moments to the parameter's dtype, and leaves the step count of unfused steps on the CPU.
            places = [place for group in loaded["param_groups"] for place in group["params"]]
            params = [p for group in self.param_groups for p in group["params"]]
            for place, p in zip(places, params, strict=False):  # torch raises if they do not fit
                kept[p] = {name: state_entry(name, x, p) for name, x in loaded["state"].get(place, {}).items()}

        def put(_: Any) -> None:
            self.state.update({p: state for p, state in kept.items() if state})
            for group in self.param_groups:
                group.update(fused=True, foreach=None, differentiable=False)

        # They run after other hooks that change the dictionary, and before those that read the loaded state.
        before = self.register_load_state_dict_pre_hook(keep)
        after = self.register_load_state_dict_post_hook(put, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()


def _numbers(group: dict[str, Any]) -> list[float]:
    """Return lr, betas, weight decay and eps; lr is 1 if it is a tensor, which multiplies it on the device."""
    lr = 1.0 if isinstance(group["lr"], Tensor) else group["lr"]
    return [float(number) for number in (lr, *group["betas"], group["weight_decay"], group["eps"])]


def along(rows: FlatRows, results: Sequence[tuple[Tensor, Tensor]]) -> Combination:
    """Return the direction of a step along the combination of ``rows``, each parameter with its gradient."""
    of_param = {id(p): g for p, g in results}
    row = [of_param.get(id(p)) for p in rows.params]
    return Combination(Rows(rows.params, [row], rows.arrangement.combined), _one(rows.device))


def _split(rows: StepRows) -> tuple[StepRows, Rows | None]:
    """Return the rows of dense gradients, and those of sparse ones whose combination is dense; None without any."""
    if not isinstance(rows, Rows) or not rows.compact:
        return rows, None
    columns = rows.arrangement.columns
    compact = [c for c in columns if rows.is_compact(c)]
    return (rows.only(c for c in columns if not rows.is_compact(c)), rows.only(compact)) if compact else (rows, None)


def along_parts(params: Sequence[Tensor], parts: Sequence[Tensor]) -> Combination:
    """Return the direction of a step along gradients of which this rank has ``parts``."""
    dtypes = {g.dtype for g in parts}
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32  # a factor of the weight may clip gradients
    return Combination(_one_row(params, parts), _one(params[0].device, dtype))


def _of_tensors(direction: Combination) -> Combination:
    """Return the same direction with rows of tensors; a matrix is combined first, which is one call."""
    rows, w = direction.rows, direction.w
    if not isinstance(rows, FlatRows):
        return direction
    results, _ = rows.combine(w[:-1], w[-1])
    return replace(along(rows, results), lr_scale=direction.lr_scale, found_inf=direction.found_inf)


def _one_row(params: Sequence[Tensor], row: Sequence[Tensor | None]) -> Rows:
    """Return the rows of one task; all parameters are unshared."""
    layouts = layouts_of(params)
    return Rows(params, [row], arranged(layouts, (layouts.reach_of(row),), (0,) * len(params), 0, None, None))


def _one(device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weight of a single row."""
    return torch.ones((1, 1), dtype=dtype, device=device)


def _check(c: Column, p: Tensor) -> None:
    if c.sparse:
        raise TypeError(
            f"the gradient of {_named(p)} is sparse, which AdamW does not support: torch.optim.SparseAdam does"
        )
    check_dtype(_named(p), p)
    if arithmetic_dtype(c.dtype) != arithmetic_dtype(p.dtype):
        raise TypeError(f"{_named(p)} is {p.dtype} and its gradient {c.dtype}, which AdamW cannot step together")
    if p.stride() != new_grad_stride(p):
        raise ValueError(
            f"{_named(p)} has strides {p.stride()}, with gaps between its numbers: AdamW steps dense memory"
        )


def _count(steps: list[Tensor], by: float | Tensor) -> None:
    """Add to all step counts: to the one tensor that they are views of, if they are all of its numbers."""
    together = steps[0]._base
    if (
        together is not None
        and together.shape == (len(steps),)
        and {id(step._base) for step in steps} == {id(together)}
    ):
        together += by
    else:
        torch._foreach_add_(steps, by)


def _named(p: Tensor) -> str:
    return f"a parameter of shape {tuple(p.shape)}"
