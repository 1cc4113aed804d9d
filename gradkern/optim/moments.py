"""The state of AdamW: the number of steps of each parameter, and its moments."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkern.distributed.by_rows import ByRows
from gradkern.gradients.sharded import has_dtensors, is_dtensor
from gradkern.ops.dtypes import arithmetic_dtype

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def states_of(
    states: Sequence[dict[str, Tensor]], params: Sequence[Tensor], names: Sequence[str], by_rows: ByRows | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the steps, and the moments of each name, of parameters of one dtype on one device.

    States are created if missing, and moved to the device and the layout of their parameters.

    Args:
        states: the state of each parameter.
        params: the parameters.
        names: names of ``MOMENTS``.
        by_rows: the cut of the moments among ranks; None if each has them whole.
    """
    device, dtype = params[0].device, arithmetic_dtype(params[0].dtype)
    if not all(map({"step", *names}.issubset, states)):
        new_steps = torch.zeros(len(params), dtype=torch.float32, device=device).unbind()
        for p, state, new_step in zip(params, states, new_steps, strict=True):
            state.setdefault("step", new_step)
            for name in names:
                if name not in state:
                    state[name] = _moment(p, None, dtype, by_rows)
    steps = [state["step"] for state in states]
    if not _are(steps, torch.float32, device):
        for state in states:
            state["step"] = state["step"].to(device, torch.float32)
        steps = [state["step"] for state in states]
    strides, moments = [p.stride() for p in params], []
    for name in names:
        of_name = [state[name] for state in states]
        if not _fit(of_name, params, strides, dtype, by_rows):
            for p, state, m in zip(params, states, of_name, strict=True):
                if not _fit([m], [p], [p.stride()], dtype, by_rows):
                    state[name] = _moment(p, m, dtype, by_rows)
            of_name = [state[name] for state in states]
        moments += of_name
    return steps, moments


def _moment(p: Tensor, value: Tensor | None, dtype: torch.dtype, by_rows: ByRows | None) -> Tensor:
    """Return memory for a moment of a parameter, with the numbers of ``value``, or zeros."""
    if is_dtensor(value) and not is_dtensor(p):
        value = value.full_tensor()
    if by_rows is not None and by_rows.cuts(p):
        rows = by_rows.here(p, p)
        part = torch.empty_strided(rows.shape, rows.stride(), dtype=dtype, device=p.device)
        part = part.zero_() if value is None else part.copy_(by_rows.here(value, p))
        return by_rows.placed(part, p)
    return torch.zeros_like(p, dtype=dtype) if value is None else torch.empty_like(p, dtype=dtype).copy_(value)


def _fit(
    moments: Sequence[Tensor],
    params: Sequence[Tensor],
    strides: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    by_rows: ByRows | None,
) -> bool:
    """Return whether moments lie as their parameters do, cut among the ranks as they should be."""
    if not _are(moments, dtype, params[0].device) or [m.stride() for m in moments] != strides:
        return False
    if by_rows is not None:
        return all(by_rows.fits(m, p) for m, p in zip(moments, params, strict=True))
    return not has_dtensors(moments) or [is_dtensor(m) for m in moments] == [is_dtensor(p) for p in params]


def _are(tensors: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether all tensors have the dtype and are on the device."""
    return {t.dtype for t in tensors} == {dtype} and {t.device for t in tensors} == {device}
