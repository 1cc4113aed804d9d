"""Groups of operator arguments that belong together, each passed as one value."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

OptionalTensors = Sequence[Tensor | None]


class _TaskGrads(NamedTuple):
    grads: OptionalTensors
    """T x n tensors, row-major: ``grads[t * n + k]`` is the gradient of task t for parameter k. None counts as zeros.
    All tensors of one k are dense with equal strides, so that they are read as flat memory. All have one dtype."""
    segments: Sequence[int]
    """n numbers: parameter k belongs to segment ``segments[k]``, which has a Gramian of its own."""
    n_segments: int
    """S, the number of segments."""


class TaskGrads(_TaskGrads):
    """T task gradients of n parameters, each tensor left where autograd put it."""

    @property
    def n_tasks(self) -> int:
        """T, the number of tasks."""
        return len(self.grads) // len(self.segments)

    def column(self, k: int) -> OptionalTensors:
        """Return the T gradients of parameter k."""
        return self.grads[k :: len(self.segments)]

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """The tensors' addresses, 0 for None; collected once for all operators on the same gradients.

        Raises:
            TypeError: the tensors have several dtypes.
        """
        return addresses("grads", self.grads)


def addresses(name: str, tensors: OptionalTensors) -> tuple[int, ...]:
    """Return the tensors' addresses, 0 for None."""
    dtypes = {t.dtype for t in tensors if t is not None}
    if len(dtypes) > 1:
        raise TypeError(f"{name} must be of one dtype, got {sorted(map(str, dtypes))}")
    return tuple([0 if t is None else t.data_ptr() for t in tensors])


class Mask(NamedTuple):
    """The entries that gradient suppression drops: they count as zeros, and are not read.

    Runs of ``block`` neighbouring entries of a parameter are its units. Unit u is dropped where word u mod 4 of
    Philox4x32-10, key ``state[0]``, counter (u div 4, ``state[1]``), is below ``state[2]``.
    """

    units: Sequence[int]
    """n numbers, the first unit of each parameter: a multiple of 4, or negative if the parameter is not masked."""
    block: int
    """The number of entries of a unit."""
    state: Tensor
    """(3,) int64 on the device: seed, step and threshold. The host never reads their values, so that each replay
    of a captured CUDA graph uses the current ones."""


class Coins(NamedTuple):
    """A random number of [0, 1) for each entry, the same for all tasks: the 24 leading bits of a word of Philox4x32-10.

    The entry at position e takes word e mod 4, key ``stream[0]``, counter (e div 4, ``stream[1]``), each of 64 bits.
    """

    positions: Sequence[int]
    """n numbers, the position of each parameter's first entry: multiples of 4."""
    stream: Tensor
    """(2,) int64 on the device, which the host never reads."""


class ProjectionArguments(NamedTuple):
    """A method that projects gradients onto those of partners: GradVac if there are targets, else PCGrad."""

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
    """n float32 tensors of no dimension: the number of steps, including this one."""


class AdamWStep(NamedTuple):
    """The numbers of one step of AdamW."""

    found_inf: Tensor | None
    """(), not 0 if nothing must change."""
    lr_scale: Tensor | None
    """(), a factor of lr."""
    hyperparameters: Sequence[float]
    """lr, beta1, beta2, weight_decay and eps."""


def sample(grads: OptionalTensors) -> Tensor:
    """Return one of the tensors, which all have the same dtype and device."""
    for g in grads:
        if g is not None:
            return g
    raise ValueError("grads holds no tensor, so their dtype and device are unknown")


def numels(tensors: OptionalTensors, n: int) -> list[int]:
    """Return the number of elements of each of n parameters, 0 if all its tensors are None.

    Args:
        tensors: row-major, any number of rows of n.
        n: the number of parameters.
    """
    # Most of the first n are tensors, and a search through all the others, hundreds of tensors, takes 70 µs.
    return [
        g.numel() if g is not None else next((t.numel() for t in tensors[k::n] if t is not None), 0)
        for k, g in enumerate(tensors[:n])
    ]
