"""Arguments of the operators that belong together, each group one value."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

OptionalTensors = Sequence[Tensor | None]


class TaskGrads(NamedTuple):
    """T task gradients of n parameters, each tensor left where autograd put it."""

    grads: OptionalTensors
    """T x n tensors, row-major: ``grads[t * n + k]`` is the gradient of task t for parameter k. None counts as zeros.
    All tensors of one k are dense with equal strides, so that they are read as flat memory. All have one dtype."""
    segments: Sequence[int]
    """n numbers: parameter k belongs to segment ``segments[k]``, which has a Gramian of its own."""
    n_segments: int
    """S, the number of segments."""

    @property
    def n_tasks(self) -> int:
        """T, the number of tasks."""
        return len(self.grads) // len(self.segments)

    def column(self, k: int) -> OptionalTensors:
        """Return the T gradients of parameter k."""
        return self.grads[k :: len(self.segments)]


class Mask(NamedTuple):
    """The entries that gradient suppression drops: they count as zeros, and are not read.

    Runs of ``block`` neighbouring entries of a parameter are its units. Unit u is dropped where word u mod 4 of
    Philox4x32-10, key ``state[0]``, counter (u div 4, ``state[1]``), is below ``state[2]``.
    """

    units: Sequence[int]
    """n numbers, the unit that each parameter starts with: a multiple of 4, or negative if it is not masked."""
    block: int
    """Entries of a unit."""
    state: Tensor
    """(3,) int64 on the device: seed, step and threshold. Nothing asks for their values, so that a captured CUDA graph
    moves on with them."""


class Projection(NamedTuple):
    """A method that projects gradients onto those of partners: GradVac where there are targets, else PCGrad."""

    order_keys: Tensor | None
    """As for the operators ``pcgrad`` and ``gradvac``."""
    partner: str
    """As for the operator ``pcgrad``; "all" for GradVac."""
    targets: Tensor | None
    """As for the operator ``gradvac``. They move unless a dot product of any segment is not finite."""
    update_mask: Tensor | None
    """As for the operator ``gradvac``."""
    beta: float
    """As for the operator ``gradvac``."""
    mean: bool
    """Whether the modified gradients are averaged over tasks, and not summed."""


class AdamWState(NamedTuple):
    """n parameters and the state of AdamW beside them."""

    params: Sequence[Tensor]
    """n dense tensors of one dtype."""
    moments: Sequence[Tensor]
    """exp_avg of all n parameters, then exp_avg_sq, then with amsgrad max_exp_avg_sq; in arithmetic dtype, laid out as
    ``params``."""
    steps: Sequence[Tensor]
    """n float32 tensors of no dimension: the number of the step, this one counted."""


class AdamWStep(NamedTuple):
    """The numbers of one step of AdamW."""

    found_inf: Tensor | None
    """(), not 0 where nothing is to change."""
    lr_scale: Tensor | None
    """(), multiplies lr."""
    hyperparameters: Sequence[float]
    """lr, beta1, beta2, weight_decay and eps."""


def sample(grads: OptionalTensors) -> Tensor:
    """Return any of the tensors, because all have the same dtype and device."""
    for g in grads:
        if g is not None:
            return g
    raise ValueError("grads holds no tensor: nothing tells their dtype and device")


def numels(tensors: OptionalTensors, n: int) -> list[int]:
    """Return the number of elements of each of n parameters, 0 where none of its tensors is there.

    Args:
        tensors: row-major, any number of rows of n.
        n: the number of parameters.
    """
    # The first n are mostly there, and to look along all the others of hundreds of tensors takes 70 µs.
    return [
        g.numel() if g is not None else next((t.numel() for t in tensors[k::n] if t is not None), 0)
        for k, g in enumerate(tensors[:n])
    ]
