"""The agreement of the ranks: facts that must be equal on all of them before the first backward pass of a step."""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from operator import is_
from typing import NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from gradkern.aggregators import Aggregator, GradAttention, Scalarization
from gradkern.distributed.agreement import Facts, digest, together
from gradkern.distributed.comm import Comm
from gradkern.distributed.refused import refuse_join, refuse_marked
from gradkern.gradients.graph import leaves, refuse_static_graph
from gradkern.gradients.layouts import grad_dtype, make_room, real_numel
from gradkern.gradients.losses import Losses, Source
from gradkern.gradients.parameters import Targets
from gradkern.gradients.sharded import box_here, is_dtensor, parts_here, place_here, refuse_meshes
from gradkern.ops.capture import capturing
from gradkern.ops.tuned import changed_settings, settings_origin
from gradkern.step.options import Options
from gradkern.step.sinks import Sink, runs_one_by_one
from gradkern.step.way import Way

LARGEST_UNIT = 4096
"""The largest block of a mask: parameters start at multiples of four blocks, and the gaps are sent too."""


Opened = tuple[Targets, Losses | None]
"""The parameters of a step that has been opened, and the losses of its second batch."""


class Start(NamedTuple):
    """The facts that the ranks have agreed on before a step's first backward pass.

    Attributes:
        comm: the ranks.
        targets: the parameters.
        present: a flag for each task: whether any rank has a loss of it.
        plan: the places of parameters that are reduced while backward passes run; None if nobody knows yet which are
            shared.
        second: the losses of the second batch; None without one.
    """

    comm: Comm
    targets: Targets
    present: list[bool]
    plan: tuple[int, ...] | None
    second: Losses | None


def start(comm: Comm, source: Source, options: Options, sink: Sink, opened: Callable[[], Opened]) -> Start:
    """Let all ranks open the step, and raise on all of them unless it is the same step everywhere.

    Args:
        comm: the ranks.
        source: the source of task gradients, which ``opened`` opens.
        options: the options.
        sink: the sink.
        opened: checks the arguments on this rank.
    """

    def open_here() -> tuple[Targets, Losses | None, bool]:
        comm.steps += 1
        targets, second = opened()
        _refuse_unsupported(options, sink.needs_tensors)
        _refuse_targets(targets)
        if targets.has_dtensors:
            _refuse_with_dtensors(comm, targets, options)
        is_new = _is_new(comm, targets)
        if is_new:
            _refuse_freed(targets)
            _refuse_wrappers(source, targets)
        return targets, second, is_new

    def facts(made: tuple[Targets, Losses | None, bool]) -> Facts:
        targets, _, is_new = made
        plans = plans_of(comm, targets)
        return {
            "steps": comm.steps,
            "method": _method_digest(options),
            "way": _way_digest(options.way),
            "callables": _runs_one_by_one(source, options),
            "tasks": len(source.present),
            "parameters": len(targets.tensors),
            "trained": digest("trained", tuple(targets.places), len(targets.given.tensors)),
            "numbers": sum(map(real_numel, targets.tensors)) if targets.has_dtensors else targets.layouts.numel,
            "layout": _layout_digest(targets),
            "groups": digest("groups", targets.groups, targets.named),
            "shard_optimizer": options.shard_optimizer,
            "update": digest("update", *sink.common),
            "first step": is_new,
            "values": _bits(_whole(targets)) if is_new else 0,
            "state": _state(comm, options.aggregator, targets),
            "part": digest("part", *map(place_here, targets.given.tensors)) if is_new and targets.has_dtensors else 0,
            "values of part": _bits(_parts(targets)) if is_new and targets.has_dtensors else 0,
            "all present": all(source.present),
            "plans": digest("plans", *sorted(plans.items())),
            "settings": digest("settings", *changed_settings(targets.device)),
        }

    (targets, second, _), of_ranks = together(comm, open_here, facts)
    _refuse_other_replicas(of_ranks)
    _refuse_other_settings(comm, of_ranks, targets)
    _note(comm, targets, options.aggregator)
    present = list(source.present)
    if not all(of_rank["all present"] for of_rank in of_ranks):
        of_tasks = list(zip(*comm.exchange_flags(source.present), strict=True))
        present = [any(flags) for flags in of_tasks]
        if targets.has_dtensors:
            _refuse_absent(of_tasks)
    plan = plans_of(comm, targets).get(tuple(present))
    if len({of_rank["plans"] for of_rank in of_ranks}) > 1:
        plan = None
    if targets.named is not None:
        plan = tuple(k for k, is_shared in enumerate(targets.named) if is_shared)
    return Start(comm, targets, present, plan, second)


def _refuse_unsupported(options: Options, needs_tensors: bool) -> None:
    """Raise NotImplementedError for what works on one rank only."""
    refused = {
        "compat=, which treats each gradient as another library does,": needs_tensors,
        f"Suppression with a block above {LARGEST_UNIT}": options.suppression is not None
        and options.suppression.block > LARGEST_UNIT,
    }
    for what, is_used in refused.items():
        if is_used:
            raise NotImplementedError(
                f"on several ranks there is no {what} yet. process_group=False lets each rank take a step of its own"
            )


def _refuse_targets(targets: Targets) -> None:
    if targets.layouts.lazy:
        raise NotImplementedError("params have no shapes yet: on several ranks run lazy modules once before the step")
    if capturing(targets.device):
        raise NotImplementedError("a step on several ranks cannot be captured in a CUDA graph: its hosts talk")


def _refuse_freed(targets: Targets) -> None:
    """Raise ValueError for a tensor without its memory: reading it would end the process."""
    for k, p in enumerate(targets.here):
        if p.numel() and not p.untyped_storage().nbytes():
            raise ValueError(
                f"{targets.name(k)} in params has no memory, as a weight that fully_shard has gathered and freed: take "
                "the parameters before the first forward pass"
            )


def _refuse_with_dtensors(comm: Comm, targets: Targets, options: Options) -> None:
    """Raise for what does not work with DTensors among the parameters."""
    refuse_meshes([(targets.name(k), p) for k, p in enumerate(targets.tensors)], comm.ranks)
    method = options.aggregator
    if isinstance(method, GradAttention) and method.update == "subset":
        raise NotImplementedError("with DTensors in params there is no GradAttention(update='subset') yet")
    if options.looks_at_positions:
        _refuse_scattered(options, targets)


def _refuse_scattered(options: Options, targets: Targets) -> None:
    """Raise NotImplementedError for parts whose numbers are not neighbours in their parameters, where they must be.

    Sampled entries are found in parts that are cut along any dimension.
    """
    method, is_masked = options.aggregator, options.suppression is not None
    for k, p in enumerate(targets.tensors):
        box = box_here(p)
        if box is None or (box.start is None and (is_masked or not isinstance(method, GradAttention))):
            raise NotImplementedError(
                f"{'Suppression' if is_masked else type(method).__name__} is for DTensors that are cut along dimension "
                f"0; in params {targets.name(k)} is {p.placements} on {p.device_mesh}"  # type: ignore[attr-defined]
            )


def _refuse_absent(of_tasks: Sequence[Sequence[bool]]) -> None:
    """Raise ValueError, on all ranks, if only some of them have a task: their backward passes wait for each other."""
    for t, flags in enumerate(of_tasks):
        if any(flags) and not all(flags):
            raise ValueError(
                f"losses[{t}] is None on rank {flags.index(False)} and not on rank {flags.index(True)}: with DTensors "
                "in params all ranks run the same backward passes, so give a loss that is multiplied by 0"
            )


def _refuse_other_replicas(of_ranks: Sequence[Facts]) -> None:
    """Raise ValueError, on all ranks, if two of them hold the same parts of DTensors with other values."""
    first: dict[int, int] = {}
    for r, of_rank in enumerate(of_ranks):
        holder = first.setdefault(of_rank["part"], r)
        if of_ranks[holder]["values of part"] != of_rank["values of part"]:
            raise ValueError(
                f"ranks {holder} and {r} hold the same parts of DTensors in params, with other values: build the model "
                "from the same seed, or broadcast its parameters, before it is sharded"
            )


def _refuse_other_settings(comm: Comm, of_ranks: Sequence[Facts], targets: Targets) -> None:
    """Raise RuntimeError, on all ranks, if the tuning tables of two of them choose different settings.

    They would add up in different orders, and replicas would part in the last bits.
    """
    own = [of_rank["settings"] for of_rank in of_ranks]
    if len(set(own)) == 1:
        return
    origins = comm.exchange_texts(settings_origin(targets.device))
    told = "; ".join(f"rank {r}: {origins[r]}" for r in sorted({own.index(digest) for digest in own}))
    raise RuntimeError(
        f"all ranks must compute under the same settings, but they differ: {told}. Set GRADKERN_TUNING to the same "
        "file on all ranks, or to off, and start them again"
    )


def _refuse_wrappers(source: Source, targets: Targets) -> None:
    """Raise ValueError if a wrapper of the model reduces gradients in its own way; callables do so when they run.

    It searches the graphs of the losses, so only the first step of some parameters does it.
    """
    refuse_marked(targets.tensors, lambda k: f"{targets.name(k)} in params")
    refuse_join(targets.tensors)

    def look(i: int, value: object) -> None:
        if isinstance(value, Tensor) and value.requires_grad:
            refuse_static_graph(f"losses[{i}]", value)
            refuse_marked(leaves(value), lambda _: f"a parameter that losses[{i}] reaches")

    def watched(i: int, loss: Callable[[], Tensor]) -> Tensor:
        value = loss()
        look(i, value)
        return value

    if isinstance(source, Losses):
        for i, loss in enumerate(source.entries):
            look(i, loss)
            if callable(loss):
                source.entries[i] = partial(watched, i, loss)


def plans_of(comm: Comm, targets: Targets) -> dict[tuple[bool, ...], tuple[int, ...]]:
    """Return the places of shared parameters by which tasks were present, as the last steps had them."""
    key = targets.layouts, targets.groups, targets.named
    if key not in comm.plans:
        make_room(comm.plans)
    return comm.plans.setdefault(key, {})


def _is_new(comm: Comm, targets: Targets) -> bool:
    """Return whether this rank has taken no step with these parameters in this order."""
    own = targets.given.tensors
    known = comm.params.get(id(own[0]), ())
    return len(known) != len(own) or not all(map(is_, [one() for one in known], own))


def _note(comm: Comm, targets: Targets, method: Aggregator) -> None:
    make_room(comm.params)
    own = targets.given.tensors
    comm.params[id(own[0])] = list(map(ref, own))
    comm.methods.add(method)


def _state(comm: Comm, method: Aggregator, targets: Targets) -> int:
    """Return what :func:`_bits` returns for a method in its first step, and 0 in later ones.

    It is 0 too if the state is means of this rank's parts of DTensors.
    """
    is_of_parts = method.averages_rows and targets.has_dtensors
    return 0 if method in comm.methods or is_of_parts else _bits((*method.parameters(), *method.buffers()))


def _runs_one_by_one(source: Source, options: Options) -> bool:
    method = options.aggregator
    if not (isinstance(source, Losses) and isinstance(method, Scalarization) and options.is_weighted_backward):
        return False
    return runs_one_by_one(source, method)


def _method_digest(options: Options) -> int:
    memory = None if options.memory is None else options.memory.counts
    said = repr((options.aggregator, options.suppression, options.conflict_lr, memory))
    return digest("method", re.sub(r" at 0x[0-9a-f]+", "", said))  # a generator's


def _way_digest(way: Way) -> int:
    return digest("way", repr(way), () if way.gramian is None else tuple(way.gramian.state_dict().values()))


def _layout_digest(targets: Targets) -> int:
    layouts = targets.layouts
    if targets.has_dtensors:  # the layouts are of parts
        placements = tuple([repr(getattr(p, "placements", None)) for p in targets.tensors])
        shapes = tuple([(*p.shape, *p.stride(), str(grad_dtype(p))) for p in targets.tensors])
        return digest("layout of parts", shapes, placements)
    return digest("layout", tuple(layouts.numels), tuple(layouts.strides), tuple(layouts.dtypes))


def _whole(targets: Targets) -> list[Tensor]:
    """Return the given parameters that every rank has whole."""
    return [p for p in targets.given.tensors if not is_lazy(p) and not is_dtensor(p)]


def _parts(targets: Targets) -> list[Tensor]:
    """Return this rank's parts of the DTensors among the given parameters."""
    return parts_here([p for p in targets.given.tensors if is_dtensor(p)])


@torch.no_grad()
def _bits(tensors: Iterable[Tensor]) -> int:
    """Return the sum of the tensors' bits as integers, each tensor's times its place."""
    totals: dict[torch.device, Tensor] = {}
    for k, p in enumerate(tensors):
        x = (torch.view_as_real(p) if p.is_complex() else p).detach().contiguous().view(-1)
        total = (2 * k + 1) * x.view(_INTEGERS[x.element_size()]).sum(dtype=torch.int64)
        totals[p.device] = totals[p.device] + total if p.device in totals else total
    return int(sum(map(int, totals.values()))) % 2**63


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
