"""GradAttention ("GradAttention: Attention-Based Gradient Surgery"): an attention network decides the task weights.

Each step samples d entries of the gradient, the same for all tasks. A task's entries form a token, self-attention over
the tokens gives one score per task, and the softmax of the scores gives the weights α. The report does not say how the
network learns. Here it learns while it is used, from the first-order decrease of the losses: it maximises

    Σ_i α_i r_i + τ H(α),   r_i = Σ_j φ_ij.

φ_ij is the cosine of gradients i and j, so that no task wins by its scale. H is the entropy; without it α would give
all weight to one task. The exact optimum is softmax(r / τ).
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from gradkern.aggregators.attention.encoder import Encoder
from gradkern.aggregators.attention.strata import strata
from gradkern.aggregators.base import Aggregator, check_gramian
from gradkern.arguments import choice, instance, integer, mapping, number, tensor
from gradkern.ops import combine, gramian
from gradkern.ops.cosines import cosines
from gradkern.ops.dtypes import arithmetic_dtype
from gradkern.ops.offsets import column_bounds
from gradkern.ops.undo import PutBack


class GradAttention(Aggregator):
    """Weights that sum to 1, from self-attention over sampled entries of the task gradients; see the module.

    Every call trains the network by one step of Adam, in training and in evaluation mode. The first call (or the
    loaded state) fixes the number of tasks, and the network moves to the device of the Gramian. The network and its
    optimizer stay float64, whatever dtype ``.to`` gets.

    Args:
        subset: the number of entries of the gradients that each step samples; all entries if there are no more.
        width: the width of the tokens.
        layers: the number of layers of the encoder.
        update: "all" applies the weights to every entry; "subset" applies them to the sampled entries only, and all
            other entries of the update are 0.
        entropy: τ; the larger, the more equal the weights.
        lr: the learning rate of Adam.
        generator: a generator on the gradients' device that samples the entries; None for the device's default one.
    """

    needs_entries = True

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
        self.subset = integer("subset", subset, 1)
        self.width = integer("width", width, 1)
        self.n_layers = integer("layers", layers, 1)
        self.update = choice("update", update, ("all", "subset"))
        self.entropy = number("entropy", entropy, above=0)
        self.lr = number("lr", lr, above=0)
        self.encoder = Encoder(self.subset, self.width, self.n_layers)
        self._adam: torch.optim.Adam | None = None  # created once the number of tasks is known

    def positions(self, sizes: tuple[int, ...], device: torch.device) -> Tensor:
        """Sample the entries of this step: ``subset`` of each group, or all if it has fewer; see ``strata.py``.

        Args:
            sizes: the number of entries of each group; the groups are consecutive.
            device: the device of the gradients.

        Returns:
            The entries' positions: int64 on ``device``, ascending.

        Raises:
            ValueError: the generator is on another device.
        """
        if self.generator is not None and self.generator.device != device:
            raise ValueError(f"generator is on {self.generator.device}, the gradients on {device}")
        return strata(sizes, self.subset).sample(device, self.generator)

    def weights(self, M: Tensor, X: Tensor) -> Tensor:  # type: ignore[override]  # the one method that reads entries
        """Return the weights of the task gradients in the update, then train the network by one step.

        The weights are those of the network before that step: one pass through it serves both.

        Args:
            M: (..., T, T), Gramians; float32 or float64. Leading dimensions are independent problems, which share
                the network.
            X: (..., T, d), d <= subset entries of each task's gradient; float32 or float64, on M's device. If d is
                less than ``subset``, zeros pad the entries on the right.

        Returns:
            (..., T), of M's dtype and on its device; the weights of each problem sum to 1. No gradient flows through
            them. They are finite even if M or X is not; the network does not learn from such a call.

        Raises:
            TypeError, ValueError: an argument is not as described above, or T differs from that of earlier calls.
        """
        check_gramian(M)
        self._check_entries(M, X)
        if M.numel() == 0 or M.device.type == "meta":  # nothing to learn from
            return M.new_empty(M.shape[:-1])
        problems = M.shape[:-2].numel()
        alpha = self._learn(M.reshape(problems, *M.shape[-2:]), X.reshape(problems, *X.shape[-2:]))
        return alpha.to(M.dtype).view(M.shape[:-1])

    def _aggregate(self, J: Tensor, offsets: Tensor | None, losses: Tensor | None, out: Tensor | None) -> Tensor:
        # Each segment has its own entries.
        sizes = tuple(b - a for a, b in pairwise(column_bounds(offsets, J.shape[1])))
        index = self.positions(sizes, J.device)
        groups = strata(sizes, self.subset)
        K = J.index_select(1, index)
        X = groups.tokens(K.detach().to(arithmetic_dtype(J.dtype)))
        X = X[0] if offsets is None else X
        if self.update == "all":
            return combine(J, self.weights(gramian(J.detach(), offsets), X), offsets, out=out)
        ends = None if offsets is None else torch.tensor([0, *accumulate(groups.counts)], device="cpu")
        g = combine(K, self.weights(gramian(K.detach(), ends), X), ends)
        return J.new_zeros(J.shape[1]).index_copy(0, index, g) if out is None else out.zero_().index_copy_(0, index, g)

    # torch.compile must not trace this training step, which runs autograd and an optimizer. The decorator is private
    # API: the public torch.compiler.disable would import the compiler with this library, which takes half a second.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _learn(self, M: Tensor, X: Tensor) -> Tensor:
        """Compute α (B, T), float64; then take one step of Adam unless an entry of M or X is not finite."""
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
            # Gradient scalers set it too: if it is 1, the fused step changes no parameter, moment or step count.
            adam.found_inf = (~(M.isfinite().all() & X.isfinite().all())).float()  # type: ignore[attr-defined]
            adam.step()
            adam.zero_grad()
            return alpha.detach()

    def _ready(self, M: Tensor) -> torch.optim.Adam:
        """Return the optimizer; move the network to M's device, and set it up for M's number of tasks if it is new."""
        if self.encoder.tokens.weight.device != M.device:
            self.to(M.device)
        if self._adam is None:
            self._begin(M.shape[-1], {})
        assert self._adam is not None
        return self._adam

    def _begin(self, tasks: int | None, adam: Mapping[int, Any]) -> None:
        """Set the network up for ``tasks`` tasks (None: as before the first call), its optimizer in state ``adam``."""
        self.encoder.begin(tasks)
        self._adam = None
        if tasks is not None:
            self._adam = torch.optim.Adam(self.encoder.parameters(), lr=self.lr, fused=True, capturable=True)
            groups = self._adam.state_dict()["param_groups"]
            self._adam.load_state_dict({"state": copy.deepcopy(adam), "param_groups": groups})

    def _check_entries(self, M: Tensor, X: Tensor) -> None:
        tensor("X", X, (torch.float32, torch.float64))
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
        """Load a :meth:`get_extra_state`. It creates an embedding of the right size, into which torch loads later."""
        mapping("the state to load", state, ("generator", "tasks", "adam"))
        tasks, adam = state["tasks"], instance("the state of Adam", state["adam"], dict, "a dict")
        super().set_extra_state(state["generator"])
        self._begin(None if tasks is None else integer("tasks", tasks, 1), adam)

    def snapshot(self) -> PutBack:
        """Return a function that puts the network, its optimizer and the generator back as they are now."""
        put_network_back, adam = super().snapshot(), self._adam

        def put_back() -> None:
            put_network_back()
            self._adam = adam

        return put_back

    def _state_dicts(self) -> Iterator[dict[str, Any]]:
        yield from super()._state_dicts()
        if self._adam is not None:
            yield from self._adam.state.values()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load as every Aggregator does; ``assign`` must be False, because the optimizer refers to the parameters."""
        if assign:
            raise ValueError("assign must be False, got True: the optimizer refers to the existing parameters")
        return super().load_state_dict(state_dict, strict)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GradAttention":
        """Move the network and the optimizer's state between devices; unlike other Modules, ignore dtypes."""

        def moved(t: Tensor) -> Tensor:
            return t.to(fn(t).device)

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
