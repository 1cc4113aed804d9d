"""The time of a step, split into parts by the code that runs, in the same way for all contestants.

- forward: the model's code.
- backward: autograd's code, in ``torch.autograd`` and in the function of gradkern that calls its engine.
- update: the code of ``AdamW.step``, torch's or gradkern's. A fused step combines the task gradients in it.
- surgery: all other code: checks, packing, dot products, projections, writing and clearing ``.grad``.

GradAttention's network also trains by autograd, which counts as surgery. On a GPU a part lasts from the start of its
first launch to the end of its last.
"""

from collections.abc import Callable

import torch

import gradkern as gk
from bench import device as machine
from bench.step.model import MultiTask
from bench.watch import watching
from gradkern.gradients import losses

WATCHED = (
    ("surgery", gk.GradAttention, "weights"),
    ("backward", torch.autograd, "grad"),
    ("backward", torch.autograd, "backward"),
    ("backward", losses, "differentiated"),
    ("update", torch.optim.AdamW, "step"),
    ("update", gk.optim.AdamW, "step"),
)
PARTS = ("forward", "backward", "surgery", "update")


def parts(
    step: Callable[[], object], device: torch.device, forward: tuple[type, str] = (MultiTask, "forward")
) -> dict[str, float]:
    """Return the seconds of each of ``PARTS`` in one call. Watching adds some microseconds to it.

    Args:
        step: step to call.
        device: device it runs on.
        forward: class and method name of the model's forward pass.
    """
    with watching([("forward", *forward), *WATCHED], device) as spent:
        whole = machine.timed(step, 1, device)
    found = dict.fromkeys(PARTS, 0.0)
    for part, start, end in spent:
        found[part] += machine.between(start, end)
    return found | {"surgery": whole - sum(found[part] for part in PARTS if part != "surgery")}
