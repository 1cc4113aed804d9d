"""Warnings of steps whose surgery does nothing, or mixes numbers that belong to one task each."""

import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradkern as gk
from gradkern.step import flat_rows, notices
from tests.models import problem

T = 3
HERE = __file__

ONE_TASK = "there is no surgery with one task in a step"
NOTHING_SHARED = "there is no surgery in this step, because no parameter"
MIXED = "surgery mixes the tasks' gradients in "

METHODS: dict[str, Callable[[], gk.Aggregator]] = {
    "pcgrad": gk.PCGrad,
    "gradvac": gk.GradVac,
    "mgda": gk.MGDA,
    "attention": lambda: gk.GradAttention(16, 8, 1),
}
UNMIXED: dict[str, Callable[[], gk.Aggregator]] = {
    "sum": gk.Sum,
    "mean": gk.Mean,
    "constant": lambda: gk.Constant([1.0, 2.0, 3.0]),
}


@pytest.fixture(autouse=True, params=["flat", "in place"])
def _rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep small task gradients in one matrix, and where autograd put them."""
    if request.param == "in place":
        monkeypatch.setattr(flat_rows, "LARGEST", 0)


@contextmanager
def heard() -> Iterator[list[warnings.WarningMessage]]:
    """Collect every warning of this library, also one that has come before from the same line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield (found := [])
    found += [w for w in caught if str(w.message).startswith((ONE_TASK, NOTHING_SHARED, MIXED))]


def named(message: str) -> list[str]:
    return re.findall(r"'([^']*)' of shape", message)


class Net(nn.Module):
    """A trunk, and numbers of all tasks in tensors that they share. ``losses`` gives a loss for each task."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 8))
        self.kind = kind
        n_heads = 0 if kind in ("wide", "bank", "interleaved") else T
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(n_heads))
        if kind in ("log-variances", "apart"):
            zeros = torch.zeros(T)
            self.s = nn.Parameter(zeros) if kind == "log-variances" else nn.ParameterList(zeros.split(1))
        elif kind in ("wide", "interleaved"):
            self.wide = nn.Linear(8, T if kind == "wide" else 2 * T)
        elif kind == "bank":
            self.bank = nn.Parameter(torch.randn(8, T, 2))
        elif kind == "stacked":
            self.scales = nn.ParameterList(torch.ones(()) for _ in range(T))

    def losses(self) -> list[Tensor]:
        torch.manual_seed(1)
        h, y = self.trunk(torch.randn(16, 6)), 3 * torch.randn(T, 16)
        if self.kind == "wide":
            out = self.wide(h).unbind(-1)
        elif self.kind == "interleaved":
            out = self.wide(h).view(16, 2, T).sum(1).unbind(-1)
        elif self.kind == "bank":
            out = torch.einsum("bi,ito->bt", h, self.bank).unbind(-1)
        else:
            out = [head(h).squeeze(-1) for head in self.heads]
        if self.kind == "stacked":
            out = (torch.stack(out) * torch.stack(list(self.scales)).unsqueeze(-1)).unbind()
        losses = [(one - target).square().mean() for one, target in zip(out, y, strict=True)]
        if hasattr(self, "s"):
            losses = [(loss * (-s).exp() + s).sum() for loss, s in zip(losses, self.s, strict=True)]
        return losses


PER_TASK = (("heads", ".weight"), ("heads", ".bias"), ("scales", ""))
OF_ALL_TASKS: dict[str, set[str]] = {
    "log-variances": {"s"},
    "wide": {"wide.weight", "wide.bias"},
    "interleaved": {"wide.weight", "wide.bias"},
    "bank": {"bank"},
    "stacked": {f"{name}.{t}{end}" for t in range(T) for name, end in PER_TASK},
}
each_kind = pytest.mark.parametrize("kind", OF_ALL_TASKS)


@each_kind
@pytest.mark.parametrize("method", METHODS)
def test_numbers_of_all_tasks_in_one_tensor_are_named(method: str, kind: str, device: torch.device) -> None:
    model = Net(kind).to(device)
    with torch.device(device), heard() as warned:
        for _ in range(3):
            gk.backward(model.losses(), model, aggregator=METHODS[method]())
    (message,) = {str(w.message) for w in warned}
    listed = named(message)
    assert len(listed) == min(5, len(OF_ALL_TASKS[kind]))
    assert OF_ALL_TASKS[kind].issuperset(listed)
    assert ("…" in message) == (len(OF_ALL_TASKS[kind]) > 5)
    for remedy in ("by shared=", "each task a tensor of its own"):
        assert remedy in message
    assert warned[0].filename == HERE


@pytest.mark.parametrize("method", METHODS)
@each_kind
def test_the_shared_parameters_named_are_taken_at_their_word(kind: str, method: str) -> None:
    model = Net(kind)
    with heard() as warned:
        gk.backward(model.losses(), model, aggregator=METHODS[method](), shared=model.trunk)
        gk.backward(model.losses(), model, aggregator=METHODS[method](), shared=model)
    assert not warned


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_for_each_task_needs_no_warning(method: str) -> None:
    for kind in ("apart", "heads alone"):
        model = Net(kind)
        with heard() as warned:
            gk.backward(model.losses(), model, aggregator=METHODS[method]())
        assert not warned


@each_kind
@pytest.mark.parametrize("method", UNMIXED)
def test_fixed_weights_mix_nothing(method: str, kind: str) -> None:
    model = Net(kind)
    with heard() as warned:
        gk.backward(model.losses(), model, aggregator=UNMIXED[method]())
        gk.backward(model.losses(), model, aggregator=UNMIXED[method](), suppression=gk.Suppression(0.5))
        gk.backward(model.losses()[:1] + [None] * 2, model, aggregator=UNMIXED[method]())
    assert not warned


def test_what_a_shared_tensor_may_look_like() -> None:
    """ReLUs that leave zeros, one entry, words of an embedding, a head that begins with zeros, a loss of zero."""
    torch.manual_seed(0)
    x = torch.randn(6, 4)
    trunk, heads = nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.ModuleList(nn.Linear(8, 1) for _ in range(2))
    temperature = nn.Parameter(torch.ones(1))
    words = nn.Embedding(200, 8)
    zeros = nn.Linear(8, 1)
    nn.init.zeros_(zeros.weight)
    h = trunk(x)
    dead = h.detach().sum(0) == 0
    h = torch.where(torch.arange(8) < 3, 0.0, h)  # three units that no task uses
    steps = {
        "relu": (trunk, [head(h).square().mean() for head in heads]),
        "of other inputs": (trunk, [heads[t](trunk(x[3 * t : 3 * t + 3])).square().mean() for t in range(2)]),
        "one entry": ([temperature, *trunk.parameters()], [(temperature * trunk(x)).sum(), temperature.exp().sum()]),
        "words": (words, [words(torch.arange(k, k + 10)).sum() for k in (0, 50)]),
        "zero head": (nn.ModuleList([trunk, heads[0], zeros]), [heads[0](trunk(x)).mean(), zeros(trunk(x)).mean()]),
        "no loss": (trunk, [trunk(x).square().sum(), (trunk(x) * 0.0).sum()]),
    }
    assert dead.sum() < 8
    for name, (params, losses) in steps.items():
        with heard() as warned:
            gk.backward(losses, params, aggregator=gk.PCGrad())
        assert not warned, name


def of_one_task_each(masks: list[np.ndarray]) -> bool:
    """Whether no entry belongs to two tasks, at least two tasks have some, and all have a quarter of all entries."""
    owners = [{tuple(entry) for entry in np.argwhere(mask)} for mask in masks]
    together = set().union(*owners)
    apart = sum(map(len, owners)) == len(together)
    return apart and sum(map(bool, owners)) > 1 and len(together) >= masks[0].size / 4


@pytest.mark.parametrize("seed", range(60))
def test_random_patterns_of_zeros(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entries, one by one, of some tensors in memory formats of all kinds, counted in pieces of any length."""
    rng = np.random.default_rng(seed)
    n_tasks = int(rng.integers(2, 5))
    monkeypatch.setattr(notices, "PIECE", int(rng.integers(1, 40)))
    params, factors, expected = {}, {}, set()
    for k in range(4):
        shape = tuple(rng.integers(1, 5, size=int(rng.integers(0, 4))))
        p = torch.zeros(*shape).permute(*rng.permutation(len(shape))) if shape else torch.zeros(())
        owner = rng.integers(0, n_tasks, size=p.shape)
        masks = [(owner == t) & (rng.random(p.shape) < rng.choice([0.2, 1.0])) for t in range(n_tasks)]
        if rng.random() < 0.5:
            masks[0] = masks[0] | (rng.random(p.shape) < 0.2)
        params[f"p{k}"] = nn.Parameter(p)
        factors[f"p{k}"] = [torch.tensor(rng.normal(size=p.shape) * mask).float() for mask in masks]
        if of_one_task_each(masks):
            expected.add(f"p{k}")
    params["shared"] = nn.Parameter(torch.zeros(2))  # so that no other warning comes
    factors["shared"] = [torch.ones(2)] * n_tasks
    losses = [sum((params[name] * row[t]).sum() for name, row in factors.items()) for t in range(n_tasks)]
    of_one = {}
    for name, row in factors.items():
        owners = [t for t in range(n_tasks) if row[t].count_nonzero()]
        if len(owners) == 1:
            of_one[name] = owners[0]
    if len(set(of_one.values())) > 1:  # each is one task's, and another is another's
        expected |= set(of_one)
    with heard() as warned:
        gk.backward(losses, list(params.items()), aggregator=gk.PCGrad())
    assert {name for w in warned for name in named(str(w.message))} == expected


def test_some_tasks_of_many_are_there() -> None:
    """A bank of forty tasks' vectors, of which two are there in a step."""
    bank, shared = nn.Parameter(torch.randn(40, 5)), nn.Parameter(torch.randn(5))
    losses: list[Tensor | None] = [None] * 40
    for t in (7, 31):
        losses[t] = (bank[t] * shared).sum()
    with heard() as warned:
        gk.backward(losses, [("bank", bank), ("shared", shared)], aggregator=gk.PCGrad())
    assert [named(str(w.message)) for w in warned] == [["bank"]]


def test_unnamed_parameters_have_their_places() -> None:
    model = Net("log-variances")
    params = [*model.trunk.parameters(), model.s]
    with pytest.warns(UserWarning, match=r"^surgery mixes the tasks' gradients in params\[4\] of shape \(3,\), which"):
        gk.SurgeryOptimizer(torch.optim.SGD(params), gk.PCGrad()).backward(model.losses())


def counted_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the size of every tensor that is read for warnings. (A CPU's back end reads others.)"""
    reads: list[int] = []
    tolist = Tensor.tolist

    def counted(x: Tensor) -> Any:
        if sys._getframe(1).f_code.co_filename == notices.__file__:
            reads.append(x.numel())
        return tolist(x)

    monkeypatch.setattr(Tensor, "tolist", counted)
    return reads


@pytest.mark.filterwarnings("ignore:surgery mixes")
@pytest.mark.parametrize("kind", ["log-variances", "apart"])
def test_only_the_first_step_is_read_and_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    method = gk.PCGrad()
    for _ in range(2):  # another model of the same shapes is another model
        model = Net(kind)
        opt = gk.SurgeryOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.1), method)
        for step in range(4):
            losses = model.losses()
            with monkeypatch.context() as patch:
                reads = counted_reads(patch)
                opt.backward(losses)
            assert len(reads) == (step == 0)


def test_what_changes_from_step_to_step_is_read_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen tasks, of which others are there in each step."""
    shared = nn.Parameter(torch.randn(7))
    reads = 0
    for step in range(40):
        losses: list[Tensor | None] = [None] * 16
        for t in (step % 16, (5 * step + 3) % 16, (7 * step + 2) % 16):
            losses[t] = (shared * torch.randn(7)).sum()
        with monkeypatch.context() as patch:
            found = counted_reads(patch)
            gk.backward(losses, [shared], aggregator=gk.PCGrad())
            reads += len(found)
    assert reads == 4


def test_new_leaves_in_each_step_are_read_a_bounded_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in code that makes its parameters anew, whose identities say nothing."""
    alive, reads = [], 0
    for _ in range(200):
        p = nn.Parameter(torch.randn(2, 3, 5, 1 + (flat_rows.LARGEST > 0)))  # layouts of this test alone
        alive.append(p)
        losses = [(p * torch.randn_like(p)).sum() for _ in range(2)]
        with monkeypatch.context() as patch:
            found = counted_reads(patch)
            gk.backward(losses, [p], aggregator=gk.PCGrad())
            reads += len(found)
    assert reads == 100


def ways(model: nn.Module, method: gk.Aggregator) -> dict[str, Callable[[list[Any]], object]]:
    """Return the ways to take a step; each call is on a line of this file."""
    params = list(model.named_parameters())
    plain = gk.SurgeryOptimizer(torch.optim.SGD(params, lr=0.1), method)
    fused = gk.SurgeryOptimizer(gk.optim.AdamW(params, lr=0.1), method)

    def accumulated(losses: list[Any]) -> None:
        with plain.accumulate():
            plain.backward(losses)

    return {
        "gk.backward": lambda losses: gk.backward(losses, params, aggregator=method),
        "backward": lambda losses: plain.backward(losses),
        "update": lambda losses: plain.update(losses),
        "fused": lambda losses: fused.update(losses),
        "accumulate": accumulated,
    }


WAYS = ("gk.backward", "backward", "update", "fused", "accumulate")


def one_of_three(model: Net) -> list[Any]:
    return [model.losses()[0], None, None]


def one(model: Net) -> list[Any]:
    return model.losses()[:1]


def heads_alone(model: Net) -> list[Any]:
    model.trunk.requires_grad_(False)
    return model.losses()


CASES: dict[str, tuple[str, Callable[[Net], list[Any]], str]] = {
    "one of three": ("heads", one_of_three, ONE_TASK),
    "one": ("heads", one, ONE_TASK),
    "frozen trunk": ("heads", heads_alone, NOTHING_SHARED),
    "log-variances": ("log-variances", lambda model: model.losses(), MIXED),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_a_warning_comes_once_and_points_at_the_users_line(case: str, way: str) -> None:
    kind, losses, message = CASES[case]
    model = Net(kind)
    step = ways(model, gk.PCGrad())[way]
    with heard() as warned:
        for _ in range(3):
            step(losses(model))
    if message == ONE_TASK and way == "accumulate":
        assert not warned  # the block may gather one task's micro-batches
        return
    (only,) = warned
    assert str(only.message).startswith(message)
    assert only.filename == HERE
    source = open(HERE).readlines()[only.lineno - 1]  # noqa: SIM115
    assert ("with plain.accumulate()" if way == "accumulate" else "lambda losses: ") in source


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_as_an_error_it_comes_before_anything_has_changed(case: str, way: str) -> None:
    kind, losses, message = CASES[case]
    if message == ONE_TASK and way == "accumulate":
        pytest.skip("no warning")
    model = Net(kind)
    method = gk.GradVac(0.5, generator=torch.Generator().manual_seed(3))
    step = ways(model, method)[way]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state, drawn = method.generator.get_state(), torch.get_rng_state()
    for _ in range(2):  # and again, as long as it is an error
        given = losses(model)
        drawn = torch.get_rng_state()
        with pytest.raises(UserWarning, match=message):
            step(given)
        assert method.targets is None
        assert torch.equal(method.generator.get_state(), state)
        assert torch.equal(torch.get_rng_state(), drawn)
        for name, p in model.named_parameters():
            assert p.grad is None
            assert torch.equal(p, before[name])


def test_memory_and_several_tasks_need_no_warning_of_one_task() -> None:
    model = Net("heads")
    remembering = gk.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), gk.PCGrad(), memory=True)
    gathering = gk.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), gk.PCGrad())
    with heard() as warned:
        for t in range(T):
            remembering.backward([loss if s == t else None for s, loss in enumerate(model.losses())])
        with gathering.accumulate():
            for t in range(T):
                gathering.backward([loss if s == t else None for s, loss in enumerate(model.losses())])
        gathering.backward([*model.losses()[:2], None])
    assert not warned


@pytest.mark.parametrize("frozen", [False, True])
def test_named_parameters_that_nothing_reaches(frozen: bool) -> None:
    """They are frozen; or only one loss reaches each."""
    model = Net("heads")
    shared = model.trunk if frozen else model.heads
    model.trunk.requires_grad_(not frozen)
    opt = gk.SurgeryOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.1), gk.PCGrad(), shared=shared)
    reached = "by any loss" if frozen else "by two losses"
    with heard() as warned:
        opt.backward(model.losses())
        opt.backward(model.losses())
    (only,) = warned
    assert str(only.message).startswith(f"{NOTHING_SHARED} of shared is reached {reached}.")


def test_tensors_without_numbers_are_not_looked_at() -> None:
    """The first step that has numbers is, though an earlier one had none."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = Net("wide")
        gk.backward(model.losses(), model, aggregator=gk.PCGrad())
    model = Net("wide")
    with heard() as warned:
        gk.backward(model.losses(), model, aggregator=gk.PCGrad())
    assert len(warned) == 1


def test_sparse_gradients_are_not_looked_at() -> None:
    """They are of embeddings, whose rows a task looks up."""
    words, head = nn.Embedding(4, 2, sparse=True), nn.Parameter(torch.ones(2))
    losses = [(words(torch.tensor(ids)) * head).sum() for ids in ([0, 1], [2, 3])]
    with heard() as warned:
        gk.backward(losses, [words.weight, head], aggregator=gk.PCGrad())
    assert not warned


@pytest.mark.parametrize("make", [gk.MGDA, gk.UPGrad, gk.PCD, gk.RGW, lambda: gk.Normalized(gk.MGDA())])
@pytest.mark.parametrize("n_present", [1, 2])
def test_a_memory_that_the_method_does_not_use(make: Callable[[], gk.Aggregator], n_present: int) -> None:
    model, x, y = problem()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = gk.SurgeryOptimizer(inner, make(), shared=model.trunk, memory=True)
    opt.backward(model.losses(x, y))  # nothing is absent
    losses = [loss if t < n_present else None for t, loss in enumerate(model.losses(x, y))]
    with pytest.warns(UserWarning, match="memory=True changes nothing") as found:
        opt.backward(losses)
    assert [w.filename for w in found] == [__file__]


@pytest.mark.parametrize("method", [gk.PCGrad(), gk.GradVac(), gk.Normalized(gk.PCGrad())], ids=repr)
@pytest.mark.filterwarnings("error")
def test_a_memory_that_the_method_uses(method: gk.Aggregator) -> None:
    model, x, y = problem()
    opt = gk.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), method, shared=model.trunk, memory=True)
    for _ in range(2):
        opt.backward([*model.losses(x, y)[:2], None])
