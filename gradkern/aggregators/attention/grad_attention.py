"""GradAttention ("GradAttention: Attention-Based Gradient Surgery"): an attention network decides the task weights.

Each step draws d entries of the gradient, the same for all tasks; each task's entries are a token, and self-attention
over the tokens ends in one score per task, whose softmax gives the weights α. The report does not say how the network
learns. Here it learns while it is used, from the first-order decrease of the losses: it maximises

    Σ_i α_i r_i + τ H(α),   r_i = Σ_j φ_ij,

φ_ij the cosine of gradients i and j, so that no task wins by its scale, and H the entropy, without which α would go to
one task alone. The exact optimum is softmax(r / τ).
"""

import copy
import sys
from collections.abc import Callable, Mapping
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from gradkern.aggregators.attention.encoder import Encoder
from gradkern.aggregators.attention.strata import strata
from gradkern.aggregators.base import Aggregator, check_gramian
from gradkern.ops import combine, gramian
from gradkern.ops.cosines import cosines
from gradkern.ops.dtypes import arithmetic_dtype
from gradkern.ops.matrix import check_matrix
from gradkern.ops.offsets import column_bounds


class GradAttention(Aggregator):
    """Weights that sum to 1, from self-attention over sampled entries of the task gradients; see the module.

    The network learns by one step of Adam at every call, in training and in evaluation mode. The number of tasks is
    that of the first call (or of the state loaded), and the network moves to the device of the Gramian. It and its
    optimizer stay float64 whatever ``.to`` says.

    Args:
        subset: how many entries of the gradients are drawn at each step; all where there are no more.
        width: of the tokens.
        layers: of the encoder.
        update: "all" applies the weights to every entry, "subset" to the drawn ones alone, and all others are 0.
        entropy: τ; the larger, the more equal the weights.
        lr: learning rate of Adam.
        generator: of the gradients' device, draws the entries; None for the device's default generator.
    """

    samples_entries = True

    def __init__(
        self,
        subset: int = 4096,
        width: int = 64,
        layers: int = 2,
        update: str = "all",
        entropy: float = 0.5,
        lr: float = 1e-3,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(generator)
        if update not in ("all", "subset"):
            raise ValueError(f"update must be 'all' or 'subset', got {update!r}")
        self.subset = _count("subset", subset)
        self.width = _count("width", width)
        self.n_layers = _count("layers", layers)
        self.update = update
        self.entropy = _positive("entropy", entropy)
        self.lr = _positive("lr", lr)
        self.encoder = Encoder(subset, width, layers)
        self._adam: torch.optim.Adam | None = None  # since the number of tasks is known

    def positions(self, sizes: tuple[int, ...], device: torch.device) -> Tensor:
        """Sample the entries of this step: of each group as many as ``subset``, or all that it has; see ``strata.py``.

        Args:
            sizes: how many entries each group has; the groups lie one after another.
            device: where the gradients are.

        Returns:
            int64 on ``device``, ascending.

        Raises:
            ValueError: the generator is on another device.
        """
        if self.generator is not None and self.generator.device != device:
            raise ValueError(f"generator is on {self.generator.device}, the gradients on {device}")
        return strata(sizes, self.subset).sample(device, self.generator)

    def weights(self, M: Tensor, X: Tensor) -> Tensor:  # type: ignore[override]  # the one method that sees entries
        """Return the weights of the task gradients in the update; the network then learns from them by one step.

        They are the network's before that step: one pass through it serves both.

        Args:
            M: (..., T, T), Gramians; float32 or float64. Leading dimensions are independent problems, which share
                the network.
            X: (..., T, d), d <= subset entries of each task's gradient; float32 or float64, on M's device. Fewer
                than ``subset`` are padded with zeros on the right.

        Returns:
            (..., T), of M's dtype and on its device, each problem's sum 1. No gradient flows through them. They are
            finite even where M and X are not; the network does not learn from such a call.

        Raises:
            TypeError, ValueError: an argument is not as said above, or T is not that of earlier calls.
        """
        check_gramian(M)
        self._check_entries(M, X)
        if M.numel() == 0 or M.device.type == "meta":  # nothing to learn from
            return M.new_empty(M.shape[:-1])
        problems = M.shape[:-2].numel()
        alpha = self._learn(M.reshape(problems, *M.shape[-2:]), X.reshape(problems, *X.shape[-2:]))
        return alpha.to(M.dtype).view(M.shape[:-1])

    def forward(self, J: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Return the update wᵀ J; see :meth:`Aggregator.forward`. Each segment has entries of its own."""
        check_matrix(J, offsets)
        sizes = tuple(b - a for a, b in pairwise(column_bounds(offsets, J.shape[1])))
        index = self.positions(sizes, J.device)
        groups = strata(sizes, self.subset)
        K = J.index_select(1, index)
        X = groups.tokens(K.detach().to(arithmetic_dtype(J.dtype)))
        X = X[0] if offsets is None else X
        if self.update == "all":
            return combine(J, self.weights(gramian(J.detach(), offsets), X), offsets)
        ends = None if offsets is None else torch.tensor([0, *accumulate(groups.counts)], device="cpu")
        g = combine(K, self.weights(gramian(K.detach(), ends), X), ends)
        return J.new_zeros(J.shape[1]).index_copy(0, index, g)

    # A training step of its own, with autograd and an optimizer inside. Private API: torch.compiler.disable, which is
    # public, would import the compiler with this library, and take half a second.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _learn(self, M: Tensor, X: Tensor) -> Tensor:
        """Return α (B, T) float64 of the network; then take one step of Adam, unless a number is not finite."""
        with torch.inference_mode(False), torch.enable_grad():
            M, X = M.detach(), X.detach()
            adam = self._ready(M)
            scores = self.encoder(X.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
            alpha = scores.softmax(-1)
            gain = alpha * (cosines(M.double()).sum(-1) - self.entropy * scores.log_softmax(-1))
            parameters = adam.param_groups[0]["params"]
            grads = torch.autograd.grad(-gain.sum(-1).mean(), parameters)
            for p, g in zip(parameters, grads, strict=True):
                p.grad = g
            # As a gradient scaler does: where it is 1, the fused step leaves parameters, moments and step count.
            adam.found_inf = (~(M.isfinite().all() & X.isfinite().all())).float()  # type: ignore[attr-defined]
            adam.step()
            adam.zero_grad()
            return alpha.detach()

    def _ready(self, M: Tensor) -> torch.optim.Adam:
        """Return the optimizer, of a network for M's number of tasks on M's device."""
        if self.encoder.tokens.weight.device != M.device:
            self.to(M.device)
        if self._adam is None:
            self._begin(M.shape[-1], {})
        assert self._adam is not None
        return self._adam

    def _begin(self, tasks: int | None, adam: Mapping[int, Any]) -> None:
        """Start a network for so many tasks (None: as before the first call) with an optimizer in that state."""
        self.encoder.begin(tasks)
        self._adam = None
        if tasks is not None:
            self._adam = torch.optim.Adam(self.encoder.parameters(), lr=self.lr, fused=True, capturable=True)
            groups = self._adam.state_dict()["param_groups"]
            self._adam.load_state_dict({"state": copy.deepcopy(adam), "param_groups": groups})

    def _check_entries(self, M: Tensor, X: Tensor) -> None:
        if not isinstance(X, Tensor):
            raise TypeError(f"X must be a tensor, got {type(X).__name__}")
        if X.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"X must be float32 or float64, got {X.dtype}")
        if X.device != M.device:
            raise ValueError(f"X must be on M's device, {M.device}; got {X.device}")
        if X.shape[:-1] != M.shape[:-1] or X.shape[-1] > self.subset:
            shape = (*M.shape[:-1], "d")
            raise ValueError(f"X must have shape {shape} with d <= subset = {self.subset}, got {tuple(X.shape)}")
        if self.encoder.tasks not in (None, M.shape[-1]):
            raise ValueError(f"the network is for {self.encoder.tasks} tasks, M has {M.shape[-1]}")

    def get_extra_state(self) -> dict[str, Any]:  # type: ignore[override]
        """Return the states of the generator and of the optimizer, and the number of tasks."""
        adam = {} if self._adam is None else self._adam.state_dict()["state"]
        return {"generator": super().get_extra_state(), "tasks": self.encoder.tasks, "adam": adam}

    def set_extra_state(self, state: Any) -> None:
        """Load what :meth:`get_extra_state` returned; torch loads the network after it, into an embedding that fits."""
        if not isinstance(state, dict) or set(state) != {"generator", "tasks", "adam"}:
            raise ValueError(f"the state to load must hold 'generator', 'tasks' and 'adam', got {state!r}")
        super().set_extra_state(state["generator"])
        self._begin(state["tasks"], state["adam"])

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load as every Aggregator does; ``assign`` must be False, because the optimizer holds the parameters."""
        if assign:
            raise ValueError("assign must be False, got True: the optimizer holds the parameters that there are")
        return super().load_state_dict(state_dict, strict)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GradAttention":
        """Move between devices, and do nothing else of what ``.to`` does; the optimizer's state goes along."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor).device)

        super()._apply(moved, recurse)
        if self._adam is not None:
            for state in self._adam.state.values():
                state.update({name: moved(value) for name, value in state.items()})
        return self

    def __repr__(self) -> str:
        generator = "" if self.generator is None else f", generator={self.generator!r}"
        return (
            f"GradAttention(subset={self.subset}, width={self.width}, layers={self.n_layers}, update={self.update!r}, "
            f"entropy={self.entropy}, lr={self.lr}{generator})"
        )


def _count(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def _positive(name: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0.0 < value <= sys.float_info.max:
        raise ValueError(f"{name} must be finite and greater than 0, got {value}")
    return float(value)
