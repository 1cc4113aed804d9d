"""The parameters of a step: checked, named, numbered into groups, and shared between tasks or not."""

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradkern.gradients.layouts import PLANS, Layouts, Reach, layouts_of, recognized
from gradkern.gradients.plan import Arrangement, arranged
from gradkern.gradients.sharded import parts_here, refuse_gathered
from gradkern.ops.dtypes import DTYPES

Params = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]]
Groups = str | Callable[[str], Hashable]

TRAINABLE = (*DTYPES, torch.complex64, torch.complex128)
"""The dtypes of parameters. Complex gradients are pairs of real ones."""
_TENSORS = frozenset((Tensor, nn.Parameter))


class Parameters(NamedTuple):
    """All given parameters. Frozen ones are included, so that freezing never renumbers a group."""

    tensors: list[Tensor]
    """n leaf tensors."""
    names: list[str] | None
    """Their names, or None if the user gave tensors only."""
    argument: str
    """The name of the argument that held them."""

    def name(self, k: int) -> str:
        """Return the name of parameter k for error messages."""
        return f"{self.argument}[{k}]" if self.names is None else repr(self.names[k])


def parameters(params: Params) -> Parameters:
    """Read ``params`` in any of its forms; raise TypeError or ValueError unless a step can take them."""
    given = read("params", params)
    _trainable(given)
    return given


class _Trainable(NamedTuple):  # the given tensors that require grad, and the first four fields of Targets
    places: list[int]
    tensors: list[Tensor]
    here: list[Tensor]
    layouts: Layouts


def _trainable(given: Parameters) -> _Trainable:
    """Return the tensors that require grad.

    Raises:
        TypeError: a tensor has a dtype that gradient surgery does not support.
        ValueError: no tensor is given, or none requires grad; a tensor is given twice, or is not a leaf; trainable
            tensors are on several devices, or nothing can be added to a ``.grad``.
    """
    tensors = given.tensors
    if not tensors:
        raise ValueError("params is empty; an iterator is, once it has been used")
    known = recognized(tensors)
    if known is not None and known.checked:  # distinct leaves that require grad
        found = _Trainable(list(range(len(tensors))), tensors, tensors, known)
    else:
        places, trainable = _requiring_grad(given)
        here = parts_here(trainable)
        found = _Trainable(places, trainable, here, layouts_of(here))
    _check_grads(given, found.places)
    if not found.layouts.checked:
        _check(given, found.places)
        found.layouts.checked = True
    return found


def _requiring_grad(given: Parameters) -> tuple[list[int], list[Tensor]]:
    """Return the places of the tensors that require grad, all of them leaves, and these tensors."""
    tensors = given.tensors
    n = len(tensors)
    if len(set(map(id, tensors))) < n:
        first: dict[int, int] = {}
        k = next(k for k, p in enumerate(tensors) if first.setdefault(id(p), k) != k)
        raise ValueError(f"params holds the same tensor twice: {given.name(first[id(tensors[k])])} and {given.name(k)}")
    places = [k for k, p in enumerate(tensors) if p.requires_grad]
    if not places:
        raise ValueError(f"params holds no tensor that requires grad, of {n} given")
    _check_forms(given, places)
    return places, tensors if len(places) == n else [tensors[k] for k in places]


def _check_forms(given: Parameters, places: Sequence[int]) -> None:
    """Raise unless the parameters at ``places`` are leaves, and dense."""
    for k in places:
        p = given.tensors[k]
        if not p.is_leaf:
            raise ValueError(f"params must be leaf tensors, whose .grad can be set; {given.name(k)} is computed")
        if p.layout is not torch.strided or p.is_nested:
            raise TypeError(
                f"params must be dense tensors; {given.name(k)} is {'nested' if p.is_nested else p.layout}: let the "
                "tensor of its values be the parameter"
            )


def read(argument: str, params: Params) -> Parameters:
    """Read tensors and names from a Module, tensors or (name, tensor) pairs.

    Raises:
        TypeError: ``params`` has none of these forms.
        ValueError: two tensors have one name.
    """
    if isinstance(params, nn.Module):
        refuse_gathered(argument, params)
        params = params.named_parameters()
    if not isinstance(params, list) and (isinstance(params, Tensor | str) or not isinstance(params, Iterable)):
        raise TypeError(f"{argument} must be a Module, tensors or (name, tensor) pairs, got {type(params).__name__}")
    entries: list[Any] = list(params)
    if _TENSORS.issuperset(map(type, entries)):  # the usual form
        return Parameters(entries, None, argument)
    pairs = [isinstance(e, tuple) and len(e) == 2 and isinstance(e[0], str) for e in entries]
    tensors = [e[1] if pair else e for e, pair in zip(entries, pairs, strict=True)]
    for k, p in enumerate(tensors):
        if not isinstance(p, Tensor):
            raise TypeError(f"{argument}[{k}] must be a tensor or a (name, tensor) pair, got {type(p).__name__}")
    if any(pairs) and not all(pairs):
        raise TypeError(
            f"{argument} mixes tensors with (name, tensor) pairs; {argument}[{pairs.index(False)}] is unnamed"
        )
    names = [e[0] for e in entries] if entries and pairs[0] else None
    if names is not None and len(set(names)) < len(names):
        k = next(k for k, name in enumerate(names) if name in names[:k])
        raise ValueError(f"{argument} holds the name {names[k]!r} twice, {argument}[{names.index(names[k])}] and [{k}]")
    return Parameters(tensors, names, argument)


def subset(shared: Params, given: Parameters) -> set[Tensor]:
    """Return the tensors of ``shared``, which has any form of ``params``, as a set.

    Raises:
        TypeError, ValueError: ``shared`` has no form of ``params``, is empty, or holds a tensor that is not in
            ``given``.
    """
    chosen = read("shared", shared)
    if not chosen.tensors:
        raise ValueError(
            f"shared is empty: {shared!r:.80} gives no parameter, such as a filter by name that fits none or an "
            "iterator that was used before. Leave shared out for the parameters that two losses reach"
        )
    known = set(given.tensors)
    for k, p in enumerate(chosen.tensors):
        if p not in known:
            raise ValueError(f"shared must be some of params; {chosen.name(k)} of shape {tuple(p.shape)} is not")
    return set(chosen.tensors)


def _check(given: Parameters, places: Sequence[int]) -> None:
    """Raise unless the layouts of the parameters at ``places`` are permitted."""
    device = given.tensors[places[0]].device
    for k in places:
        p, name = given.tensors[k], given.name(k)
        if p.dtype not in TRAINABLE:
            raise TypeError(
                f"params must be float32, float64, bfloat16, float16, complex64 or complex128; {name} is {p.dtype}"
            )
        if p.device != device:
            raise ValueError(f"params must be on one device; {name} is on {p.device}, others on {device}")


def _check_grads(given: Parameters, places: Sequence[int]) -> None:
    """Raise unless each ``.grad`` of the parameters at ``places`` can be added to."""
    for k, p, g in [(k, p, g) for k in places if (g := (p := given.tensors[k]).grad) is not None]:
        if (reason := why_unwritable(g, p)) is not None:
            raise ValueError(f".grad of {given.name(k)} in params cannot be added to in place: {reason}")


def why_unwritable(g: Tensor, p: Tensor) -> str | None:
    """Return why nothing can be added in place to ``g``, the ``.grad`` of ``p``; None if something can."""
    if g.is_inference():
        return "it was made in inference mode; set it to None, or to its clone"
    if g.shape != p.shape or g.device != p.device:
        return f"it is {tuple(g.shape)} on {g.device}, the parameter {tuple(p.shape)} on {p.device}"
    if not g.is_sparse and _has_overlap(g):
        return f"strides {g.stride()}"
    return None


def _has_overlap(g: Tensor) -> bool:
    return any(stride == 0 and size > 1 for stride, size in zip(g.stride(), g.shape, strict=True))


class Grouping(NamedTuple):
    """The groups of all given parameters."""

    numbers: Sequence[int]
    """The group of each parameter."""
    n_segments: int
    """S, the number of groups."""
    names: Sequence[Hashable] | None
    """The names of the groups; None for the one group of "model"."""


def grouping(given: Parameters, groups: Groups) -> Grouping:
    """Return the groups of parameters, numbered by first appearance.

    Raises:
        TypeError: ``groups`` is neither a string nor a function.
        ValueError: ``groups`` is an unknown string, or needs names that ``given`` does not have.
    """
    n = len(given.tensors)
    if not isinstance(groups, str) and not callable(groups):
        raise TypeError(f"groups must be a string or a function of the name, got {type(groups).__name__}")
    if groups == "model":
        return Grouping([0] * n, 1, None)
    if groups == "parameter":
        return Grouping(range(n), n, _places(given.argument, n) if given.names is None else given.names)
    if isinstance(groups, str) and groups != "module":
        raise ValueError(f"groups must be 'model', 'parameter', 'module' or a function of the name, got {groups!r}")
    if given.names is None:
        raise ValueError(f"groups={groups!r} needs names: give params as a Module or as (name, tensor) pairs")
    group_of = _owning_module if groups == "module" else groups
    assert callable(group_of)
    numbers: dict[Hashable, int] = {}
    numbered = []
    for name in given.names:
        group = group_of(name)
        if not isinstance(group, Hashable) or isinstance(group, Tensor):
            raise TypeError(f"groups must give hashable values that are not tensors; gave {group!r} for {name!r}")
        numbered.append(numbers.setdefault(group, len(numbers)))
    return Grouping(numbered, len(numbers), tuple(numbers))


@lru_cache(maxsize=PLANS)
def _places(argument: str, n: int) -> tuple[str, ...]:
    return tuple([f"{argument}[{k}]" for k in range(n)])


def _owning_module(name: str) -> str:
    return name.rpartition(".")[0]


class Targets(NamedTuple):
    """The trainable parameters of a step, their groups, and the rule for which of them are shared."""

    given: Parameters
    """All parameters given, frozen ones too."""
    tensors: list[Tensor]
    """n parameters that require grad."""
    here: list[Tensor]
    """The part of each on this rank: the shard of a DTensor; ``tensors`` themselves if there is none."""
    layouts: Layouts
    """The layouts of these parts."""
    places: list[int]
    """The index of each among all given parameters."""
    grouping: Grouping
    """The groups of all given parameters."""
    chosen: set[Tensor] | None
    """The shared parameters that the user names; None if those that two tasks reach are shared."""
    groups: tuple[int, ...]
    """The group of each."""
    named: tuple[bool, ...] | None
    """Whether each is among ``chosen``."""

    @classmethod
    def of(cls, params: Params, groups: Groups, shared: Params | None) -> "Targets":
        """Read and check the user's arguments.

        Raises:
            TypeError, ValueError: as :func:`parameters`, :func:`grouping` and :func:`subset`.
        """
        given = read("params", params)
        found = _trainable(given)
        return cls._at(found, given, grouping(given, groups), None if shared is None else subset(shared, given))

    @classmethod
    def _at(
        cls,
        found: _Trainable,
        given: Parameters,
        grouping: Grouping,
        chosen: set[Tensor] | None,
    ) -> "Targets":
        places, tensors, here, layouts = found
        named = None if chosen is None else tuple([p in chosen for p in tensors])
        numbers = grouping.numbers
        groups = tuple(numbers if len(places) == len(numbers) else [numbers[k] for k in places])
        return cls(given, tensors, here, layouts, places, grouping, chosen, groups, named)

    @property
    def has_dtensors(self) -> bool:
        """Whether any of the parameters is a DTensor."""
        return self.here is not self.tensors

    @property
    def device(self) -> torch.device:
        """The device of all parameters."""
        return self.layouts.device

    @property
    def frozen(self) -> list[Tensor]:
        """The given parameters that are not among the targets."""
        if len(self.places) == len(self.given.tensors):
            return []
        trained = set(self.tensors)
        return [p for p in self.given.tensors if p not in trained]

    def name(self, k: int) -> str:
        """Return the name of target k for messages, and its shape."""
        return f"{self.given.name(self.places[k])} of shape {tuple(self.tensors[k].shape)}"

    def as_now(self, others: Collection[Tensor]) -> "Targets":
        """Return the targets as the parameters are now, since a callable may have changed them.

        Args:
            others: given parameters that are not among the targets but have gradients; they are targets then.

        Raises:
            TypeError, ValueError: another parameter cannot be trained.
        """
        if not others:
            layouts = layouts_of(self.tensors)
            return self if layouts is self.layouts else self._replace(layouts=layouts)
        wanted = {*self.tensors, *others}
        places = [k for k, p in enumerate(self.given.tensors) if p in wanted]
        _check_forms(self.given, places)
        _check(self.given, places)
        _check_grads(self.given, places)
        tensors = [self.given.tensors[k] for k in places]
        found = _Trainable(places, tensors, tensors, layouts_of(tensors))
        return self._at(found, self.given, self.grouping, self.chosen)

    def are_shared(self, reach: Reach) -> tuple[bool, ...]:
        """Return whether each parameter is shared: named, or if none are named, reached by at least two tasks.

        Args:
            reach: the layouts of T rows of n gradients, None where a task does not reach a parameter.
        """
        if self.named is not None:
            return self.named
        return tuple([sum(kind is not None for kind in kinds) > 1 for kinds in zip(*reach, strict=True)])

    def arranged(self, reach: Reach, shared: tuple[bool, ...] | None, units: tuple[int, ...] | None) -> Arrangement:
        """Return the arrangement of gradients with a reach.

        Args:
            reach: the layouts of the gradients.
            shared: whether each parameter is shared; None to decide it by ``reach``.
            units: the first unit of suppression of each parameter; None without suppression.
        """
        decided = self.named if shared is None else shared
        return arranged(self.layouts, reach, self.groups, self.grouping.n_segments, decided, units)
