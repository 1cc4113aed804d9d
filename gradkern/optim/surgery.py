"""Any torch optimizer with gradient surgery in its backward pass."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Unpack

import torch
from torch.optim import Optimizer

from gradkern.advice.advice import Advice
from gradkern.advice.advise import advised
from gradkern.aggregators import Aggregator
from gradkern.arguments import boolean
from gradkern.distributed.by_rows import ByRows
from gradkern.distributed.comm import ProcessGroup
from gradkern.gradients.accumulation import Accumulation
from gradkern.gradients.features import Features
from gradkern.gradients.losses import Loss, Losses, Source, entries_of
from gradkern.gradients.memory import Memory
from gradkern.gradients.parameters import Groups, Params
from gradkern.gradients.sharded import parts_here
from gradkern.gradients.sources import from_losses
from gradkern.info import SurgeryInfo
from gradkern.modifiers.conflict_lr import ConflictLR, rescaled
from gradkern.modifiers.sketch import Sketch
from gradkern.modifiers.suppression import Suppression
from gradkern.ops.undo import Undo
from gradkern.optim.adamw import AdamW
from gradkern.optim.arguments import check_closure, check_group, check_options, checked_limit
from gradkern.optim.checkpoint import Remembered, load_with_surgery, restored, save_with_surgery
from gradkern.optim.fused_sink import FusedAdamWSink
from gradkern.optim.grad_step import loss_scale, refuse_closure, step_by_grad
from gradkern.optim.shard_sink import cut_state, refuse_uncut, update_sink
from gradkern.optim.undo import grads_of, scale_of, stage_of, undone_if_skipped
from gradkern.optim.untracked import Untracked
from gradkern.optim.wrapper import OptimizerWrapper
from gradkern.step.backward import add_up, grad_sink
from gradkern.step.options import Options
from gradkern.step.pipeline import outside_inference_mode, run
from gradkern.step.second import Second, check_wanted
from gradkern.step.sinks import Sink
from gradkern.step.way import Way, WayArguments


class SurgeryOptimizer(OptimizerWrapper):
    """Wraps a torch optimizer: ``opt.zero_grad(); opt.backward(losses); opt.step()``.

    Schedulers, gradient scalers and hooks accept it as an optimizer. Its ``param_groups``, ``state`` and ``defaults``
    are the wrapped optimizer's own. Its ``state_dict`` is the wrapped optimizer's with one more entry, "surgery". It
    loads an ordinary optimizer's checkpoint too, and an ordinary optimizer loads its checkpoint.

    Public attributes that it lacks are read from the wrapped optimizer: ``train`` and ``eval`` of a schedule-free one,
    ``first_step`` and ``second_step`` of SAM. They do there what they always do; ``conflict_lr`` scales ``step`` alone.

    Args:
        optimizer: the optimizer that takes the step, over leaf tensors as in :func:`gradkern.backward`; not another
            SurgeryOptimizer. Give it ``model.named_parameters()`` where ``groups`` needs names.
        aggregator: the method, such as ``gradkern.PCGrad()``.
        groups, shared, process_group: as in :func:`gradkern.backward`.
        suppression: as in :func:`gradkern.backward`; its step is part of ``state_dict``.
        conflict_lr: scales each step by the conflict of the tasks' gradients in the last backward pass before it.
        memory: whether a task that is absent in a step takes part with the gradient of its last step, at first with
            zeros: the present tasks' gradients are modified against it. The T gradients are part of ``state_dict``.
            Methods that leave absent tasks out, as ``MGDA``, still do so.
        shard_optimizer: whether each of several ranks keeps the moments of some rows of every parameter alone, as ZeRO
            1 does. ``optimizer`` is a :class:`gradkern.optim.AdamW` then. ``update`` sends as much as without it; with
            suppression and in a few other cases, as ``backward`` and ``step`` do, one vector of all parameters more.
        through, finish, gramian, per_example: as in :func:`gradkern.backward`. ``backward`` and ``update`` take them
            too, for one call. The position of ``gramian``, a sketch, is part of ``state_dict``.

    Raises:
        TypeError, ValueError: an argument is not as said above.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        aggregator: Aggregator,
        *,
        groups: Groups = "model",
        shared: Params | None = None,
        suppression: Suppression | None = None,
        conflict_lr: ConflictLR | None = None,
        memory: bool = False,
        process_group: ProcessGroup | bool | None = None,
        shard_optimizer: bool = False,
        through: str = "rows",
        finish: str = "backward",
        gramian: Sketch | None = None,
        per_example: bool = False,
    ) -> None:
        self._way = Way(through, finish, gramian, per_example)
        Options(aggregator, suppression=suppression, conflict_lr=conflict_lr).check()
        boolean("memory", memory)
        super().__init__(optimizer)
        refuse_uncut(optimizer, shard_optimizer)
        self.aggregator = aggregator
        self.groups = groups
        self.shared = list(shared) if isinstance(shared, Iterator) else shared  # every step iterates over it
        self.suppression = suppression
        self.conflict_lr = conflict_lr
        self.process_group = process_group
        self.shard_optimizer = shard_optimizer
        self._memory = Memory() if memory else None
        # κ of the last backward pass, until a step uses it, and within accumulate() the sums of gradients. Lightning's
        # wrapper runs these methods with itself as self, whose attributes a step does not see, so an object has them.
        self._pending = SimpleNamespace(step_scale=None, accumulation=None)
        self._scaler_proxy = SimpleNamespace(_step_supports_amp_scaling=True)  # see fused_sink.py
        self._untracked = Untracked()
        check_options(self._options(), self._params())

    def backward(
        self,
        losses: Sequence[Loss],
        *,
        features: Features | None = None,
        batched: bool = False,
        retain_graph: bool = False,
        second: Sequence[Loss] | None = None,
        **way: Unpack[WayArguments],
    ) -> SurgeryInfo:
        """Run :func:`gradkern.backward` on the optimizer's parameters: accumulate the surgery's result into ``.grad``.

        Before it writes, the first call warns of parameters that the losses reach and the optimizer lacks.

        Args:
            losses, features, batched, retain_graph, second: as in :func:`gradkern.backward`.
            way: ``through``, ``finish``, ``gramian``, ``per_example``, in place of the optimizer's own.

        Raises:
            TypeError, ValueError: as for :func:`gradkern.backward`.
        """
        check_wanted(second, self.aggregator)
        options = self._options(**way)
        return self._backward(from_losses(self._listed(losses), features, batched, retain_graph), options, second)

    def _backward(self, source: Losses, options: Options, second: Second) -> SurgeryInfo:
        total: Accumulation | None = self._pending.accumulation
        if total is not None:
            options.way.refuse_sums()
        if total is not None and not options.adds_at_once:
            info = add_up(total, source, self._params())
        else:
            if total is not None:
                total.expect(len(source.given))
            info = self._run(source, options, second)
            self._pending.step_scale = info.step_scale
            if total is not None:
                total.took([loss is not None for loss in source.given], info)
        return info

    def advise(self, losses: Sequence[Loss], *, features: Features | None = None) -> Advice:
        """Return what each way of a step costs on these losses, and change nothing; see :func:`gradkern.advise`."""
        self._refuse_within_accumulate("advise()")
        return advised(losses, features, self._options(), self._params(), self._grad_sink)

    @contextmanager
    def accumulate(self) -> Iterator[Accumulation]:
        """Make ``backward`` add up the gradients of each task within the block; its end runs the surgery of the sums.

        Surgery gets the gradients of one big batch, if losses are divided by the number of micro-batches. One gradient
        per task is kept. The end of the block writes ``.grad``, unless an exception ends it. (``Sum``, ``Mean`` and
        ``Constant`` without a report add to ``.grad`` at once.) Parameters that are frozen by then get the sums from
        before. Call ``zero_grad`` before the block, ``step`` and ``state_dict`` after it. On several ranks its end is
        one step of all of them, and what ``backward`` returns is this rank's.

        Yields:
            The sums, whose ``info`` is the step's once the block has ended.

        Raises:
            RuntimeError: the block is within another such block, or continued after a backward pass in it raised.
            ValueError: the method needs a second batch, or ``through`` is not "rows".
        """
        if self._pending.accumulation is not None:
            raise RuntimeError("accumulate() within accumulate(): leave the first block before the next")
        self._way.refuse_sums()
        if self.aggregator.needs_second:
            raise ValueError(
                f"accumulate() has no second batch, which {self.aggregator!r} needs: call backward outside of it"
            )
        total = self._pending.accumulation = Accumulation()
        try:
            yield total
        finally:
            self._pending.accumulation = None
        total.check()
        if any(total.present) and total.info is None:
            total.info = self._run(total, self._options())
            self._pending.step_scale = total.info.step_scale

    @outside_inference_mode
    def update(
        self,
        losses: Sequence[Loss],
        *,
        max_norm: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
        features: Features | None = None,
        batched: bool = False,
        retain_graph: bool = False,
        second: Sequence[Loss] | None = None,
        **way: Unpack[WayArguments],
    ) -> SurgeryInfo:
        """Run backward pass, clipping and step in one, then clear ``.grad``.

        A ``.grad`` that is there before the call is added to the gradient, and copied in case something raises; call
        ``zero_grad`` first to drop it.

        Around :class:`gradkern.optim.AdamW` the step itself computes the combined gradient, which is never stored. Its
        norm follows from the weights and the Gramian, with an error of up to a thousandth of the task gradients'
        lengths, which matters if these nearly cancel: use ``backward`` and ``step`` then. ``.grad`` is written around
        other optimizers, on several ranks without ``shard_optimizer``, through activations or features, and if a
        suppressed update's norm is needed.

        Whatever raises, a hook or a lack of memory too, everything is as before the call and it can be repeated: every
        ``.grad``, the state of the method, the masks and the memory, κ of an earlier ``backward``, and what ``scaler``
        has noted of this optimizer. Three things are not taken back: what the wrapped optimizer has done by then to
        parameters and its state, if its own step fails halfway or a hook after it raises; numbers drawn from torch's
        default generators; and the graphs of ``losses``, which the backward pass frees.

        Args:
            losses: one entry per task, as in :func:`gradkern.backward`.
            max_norm: the largest norm allowed for the gradient over all parameters, above 0; infinity only measures it.
                A longer gradient is scaled down to it, and one whose norm is not finite becomes NaN.
            scaler: the gradient scaler that scaled the losses; it skips a step that is not finite. If ``.grad`` was
                written, the method, masks and memory are then as before. A method that looks at losses sees them
                without the scale. Call the scaler's ``update`` afterwards.
            features, batched, retain_graph, second, way: as for ``backward``.

        Returns:
            The step's results, with ``max_norm`` also the norm before clipping.

        Raises:
            TypeError, ValueError: as for :func:`gradkern.backward`; also if the wrapped optimizer's step needs a
                closure, as that of L-BFGS does; with ``max_norm`` if a gradient is sparse; and around
                :class:`gradkern.optim.AdamW` if one is, or if a parameter has gaps between its numbers.
        """
        max_norm = checked_limit(max_norm, scaler)
        self._refuse_within_accumulate("update()")
        source = from_losses(self._listed(losses), features, batched, retain_graph)
        source.loss_scale = loss_scale(scaler, self._tensors())
        options = self._options(**way)
        sink = self._update_sink(options, (self.optimizer, self.step, self._scaler_proxy, max_norm, scaler))
        if sink is None:
            refuse_closure(self.optimizer)
            grads, scale = grads_of(self._tensors(), changed=True), scale_of(self._pending)
            states = options.snapshot()
            skipped = undone_if_skipped(scaler, self.optimizer, states)
            with Undo(*states, grads, scale, stage_of(scaler, self)), skipped:
                info = self._backward(source, options, second)
                return step_by_grad(self, self._tensors(), info, max_norm, scaler)
        info = self._run(source, options, second, sink)
        self._pending.step_scale = None
        return replace(info, total_norm=sink.total_norm)

    def _cut(self) -> ByRows | None:
        return cut_state(self.optimizer, self.process_group, self.shard_optimizer)

    def _listed(self, losses: Sequence[Loss]) -> Sequence[Loss]:
        """Return ``losses`` as a list; those of the first step look for untracked parameters."""
        return self._untracked.watched(entries_of("losses", losses), self._tensors)

    def _run(self, source: Source, options: Options, second: Second = None, sink: Sink | None = None) -> SurgeryInfo:
        return run(source, sink or self._grad_sink(source, options), options, self._params(), second)

    def _grad_sink(self, source: Source, options: Options) -> Sink:
        return grad_sink(source, options)

    def _update_sink(self, options: Options, step: tuple[Any, ...]) -> FusedAdamWSink | None:
        return update_sink(options, self._tensors(), self._cut(), step)

    def _options(self, **way: Unpack[WayArguments]) -> Options:
        modifiers = self.suppression, self.conflict_lr, self._memory
        on_ranks = self.process_group, self.shard_optimizer
        return Options(self.aggregator, self.groups, self.shared, *modifiers, *on_ranks, self._way.but(**way))

    def _refuse_within_accumulate(self, what: str) -> None:
        if self._pending.accumulation is not None:
            raise RuntimeError(f"{what} within accumulate(): gradients are combined at the end of its block")

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Take a step of the wrapped optimizer, scaled by ``conflict_lr``; pass ``closure`` on to it.

        Raises:
            TypeError: ``closure`` is neither a function nor None.
        """
        check_closure(closure)
        self._refuse_within_accumulate("step()")
        self._cut()
        if self.conflict_lr is None or (isinstance(self.optimizer, AdamW) and self.optimizer.combination is not None):
            return self._inner_step(closure)
        params = parts_here([p for p in self._tensors() if closure is not None or p.grad is not None])
        with rescaled(params, self._pending):
            return self._inner_step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as the wrapped optimizer does."""
        self._refuse_within_accumulate("zero_grad()")
        self._pending.step_scale = None
        super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the wrapped optimizer; their surgery starts without state.

        Args:
            param_group: a dictionary that holds "params", tensors or (name, tensor) pairs, and options of the wrapped
                optimizer.

        Raises:
            TypeError, ValueError: ``param_group`` is not as said above, or with it the parameters are not as
                :func:`gradkern.backward` takes them. Nothing has changed then.
        """
        check_group(param_group, self._params(), self.groups, self.shared)
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's ``state_dict`` with the state of the surgery as its entry "surgery".

        That entry is the method's name and state, the suppression's seed and step, and the gradients in ``memory``. The
        first parameter group holds it too, as bytes: ``get_optimizer_state_dict`` of ``torch.distributed.checkpoint``
        keeps nothing but parameters' states and groups. (With ``flatten_optimizer_state_dict=True`` save the entry
        beside it.) With DTensors all ranks must call it if there is a memory or a method on means, which are whole.
        """
        self._refuse_within_accumulate("state_dict()")
        return save_with_surgery(self, self._remembered())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a :meth:`state_dict`, or an ordinary optimizer's, which leaves the method's state unchanged.

        Raises:
            TypeError, ValueError: ``state_dict`` has another form, the checkpoint belongs to another method, or its
                state does not fit this one. Nothing has been loaded then.
        """
        load_with_surgery(self, self._remembered(), state_dict)

    def _remembered(self) -> Remembered:
        return Remembered(self._options(), self._tensors())

    def __repr__(self) -> str:
        memory = self._memory and True
        modifiers = {"suppression": self.suppression, "conflict_lr": self.conflict_lr, "memory": memory}
        given = {name: value for name, value in modifiers.items() if value is not None} | self._way.given
        more = "".join(f", {name}={value!r}" for name, value in given.items())
        return f"SurgeryOptimizer({self.optimizer!r}, {self.aggregator!r}, groups={self.groups!r}{more})"

    def __reduce__(self) -> tuple[Any, ...]:  # torch's keeps only groups and state
        self._refuse_within_accumulate("a copy")
        return restored, (type(self), self.optimizer, self._options(), self._pending.step_scale, self._untracked)
