"""Steps through activations on several ranks: compared with rows of one process, sketched, and with faults."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

import gradkern as gk
from tests.distributed.jobs import SHARDINGS, Net, Run, mesh_of, whole
from tests.distributed.pool import Pool
from tests.distributed.test_equal import check
from tests.distributed.test_faults import forget
from tests.distributed.test_tasks import Experts, assert_near, data, part
from tests.distributed.test_words import Counted

T = 3
FINISH = ["backward", "kept"]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("finish", FINISH)
@pytest.mark.parametrize("method", ["PCGrad", "MGDA", "UPGrad", "Uncertainty, report", "Sum, report"])
def test_it_is_that_of_one_process(pool: Pool, method: str, finish: str, ranks: int) -> None:
    check(pool, Run(method, finish=finish), ranks)


@pytest.mark.parametrize("finish", FINISH)
@pytest.mark.parametrize("kind", ["ddp", "update", "fused", "shard"])
def test_every_way_to_take_a_step(pool: Pool, kind: str, finish: str) -> None:
    kinds: dict[str, Any] = {kind: True, "update": kind in ("update", "shard")}
    check(pool, Run("MGDA", finish=finish, **kinds), 2)


@pytest.mark.parametrize(
    "options", ["parameter", "module", "shared", "suppression", "suppression in blocks", "conflict_lr"]
)
def test_groups_and_modifiers(pool: Pool, options: str) -> None:
    check(pool, Run("GradVac" if options == "parameter" else "PCGrad", finish="kept", options=options), 3)


def test_the_learning_rate_by_conflict(pool: Pool) -> None:
    check(pool, Run("PCGrad", finish="backward", options="conflict_lr"), 2)


@pytest.mark.parametrize("method", ["PCGrad", "MGDA", "UPGrad"])
@pytest.mark.parametrize("sharding", ["resharded", "kept", "gathered", "of root", "heads left out", "columns"])
def test_sharded_parameters(pool: Pool, sharding: str, method: str) -> None:
    check(pool, Run(method, finish="backward", sharding=sharding), 2)


def test_sharded_parameters_with_replicas(pool: Pool) -> None:
    check(pool, Run("MGDA", finish="backward", sharding="replicas"), 4)


def images() -> tuple[nn.Module, Tensor]:
    """Return a model of which each layer's backward pass reads a weight, with a result for each task, and a batch."""
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, groups=2), nn.Tanh(), nn.Flatten()]
    layers = [nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, T)]
    return nn.Sequential(*convolutions, *layers).double(), torch.randn(8, 2, 5, 5).double()


def of_images(rank: int, group: Any, ranks: int, policy: Any = None) -> list[Tensor]:
    """Return Gramian, weights and gradients of a step of the model, which one process takes by rows."""
    model, x = images()
    way: dict[str, Any] = {}
    if ranks > 1:
        fully_shard(model, mesh=mesh_of(group, ranks, ""), **({} if policy is None else {"mp_policy": policy}))
        way = {"through": "activations"}
    params = list(model.parameters())
    y = model(x[rank * 8 // ranks : (rank + 1) * 8 // ranks])
    losses = [(y - target).square().mean().double() for target in 3 * torch.eye(T)]
    info = gk.backward(losses, params, aggregator=gk.MGDA(), process_group=group, **way)
    assert info.gramian is not None
    assert info.weights is not None
    return [info.gramian, info.weights, *(whole(p.grad) for p in params if p.grad is not None)]


def test_weights_that_are_gathered_together(pool: Pool) -> None:
    """They are freed at the end of each pass."""
    expected = of_images(0, False, 1)
    for found in pool.run(of_images, 2, ranks=2):
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)  # float64 sums of hundreds of numbers


def test_weights_that_are_gathered_in_fewer_bits(pool: Pool) -> None:
    M, _, *grads = of_images(0, False, 1)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for found in pool.run(of_images, 2, policy, ranks=2):
        torch.testing.assert_close(found[0].double(), M, rtol=0.1, atol=0.05 * M.abs().max().item())  # eight bits
        assert len(found) == 2 + len(grads)


def lacking(
    rank: int, group: Any, ranks: int, finish: str, absent: Sequence[tuple[int, int]], shared_by: Sequence[int] = ()
) -> list[Any]:
    """Return the result of two steps in which ranks lack tasks, through activations; by rows in one process.

    Args:
        rank: this rank; one process does what all ranks do.
        group: the ranks; False for one process.
        ranks: the number of ranks.
        finish: how a step ends.
        absent: the pairs of a rank and a task that it lacks.
        shared_by: for each task, the number of the first layer that it goes through; none for models without one.
    """
    torch.manual_seed(0)
    model = Experts()
    params = list(model.parameters())
    way: dict[str, Any] = {} if group is False else {"through": "activations", "finish": finish}
    results = []
    for step in range(2):
        x, y = data(step)
        losses: list[Tensor | None] = []
        for t in range(T):
            having = [r for r in range(ranks) if (r, t) not in absent]
            here = having if group is False else [rank] if rank in having else []
            parts = [model.loss_by(shared_by[t] if shared_by else 0, t, *part(r, ranks, x, y)) for r in here]
            losses.append(sum(parts[1:], parts[0]) / (ranks if group is False else 1) if parts else None)
        for p in params:
            p.grad = None
        info = gk.backward(losses, params, aggregator=gk.MGDA(), process_group=group, **way)
        results.append(([p.grad for p in params], info.losses, info.gramian, info.weights))
        with torch.no_grad():
            for p in params:
                if p.grad is not None:
                    p -= 0.1 * p.grad
    return results


ABSENT = {
    "on all ranks": [(0, 1), (1, 1)],
    "on one rank": [(1, 1)],
    "another on each rank": [(0, 0), (1, 2)],
    "all but one on a rank": [(1, 0), (1, 1)],
    "all but one on each rank": [(0, 0), (0, 1), (1, 1), (1, 2)],
}
"""The pairs of a rank and a task that it lacks."""


@pytest.mark.parametrize("finish", FINISH)
@pytest.mark.parametrize("name", ABSENT)
def test_absent_tasks(pool: Pool, name: str, finish: str) -> None:
    """What two tasks share on any ranks is under surgery on all of them."""
    expected = lacking(0, False, 2, finish, ABSENT[name])
    for results in pool.run(lacking, 2, finish, ABSENT[name], ranks=2):
        assert_near(results, expected)


@pytest.mark.parametrize("finish", FINISH)
def test_a_parameter_of_one_task_on_some_ranks(pool: Pool, finish: str) -> None:
    """Task 2 alone goes through the second of the first layers; rank 0 lacks task 0."""
    expected = lacking(0, False, 3, finish, [(0, 0)], [0, 0, 1])
    for results in pool.run(lacking, 3, finish, [(0, 0)], [0, 0, 1], ranks=3):
        assert_near(results, expected)


class Words(nn.Module):
    """A model with an embedding, a layer without a bias, a scale that no layer holds, and heads."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 12, padding_idx=0)
        self.layer = nn.Linear(12, 8, bias=False)
        self.scale = nn.Parameter(torch.ones(8))
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(T))
        self.double()

    def losses(self, ids: Tensor, y: Tensor, at: Sequence[Callable[[Tensor], Tensor]]) -> list[Tensor]:
        """Return a loss for each task; ``at`` are functions above, within and below the shared part."""
        below, within, above = at
        h = above(self.scale * torch.tanh(self.layer(within(below(self.words(ids)))).mean(1)))
        return [(head(h).squeeze(-1) - target).square().mean() for head, target in zip(self.heads, y, strict=True)]


COLUMNS = 4
BATCH = 24
"""The number of examples, of 5 words each: more tokens than columns and words, so that one process sketches as well."""
PLAIN: list[Callable[[Tensor], Tensor]] = [torch.clone] * 3


def words(rank: int, ranks: int) -> tuple[Words, Tensor, Tensor]:
    """Return the model, and a rank's part of a batch; the whole batch with one rank."""
    torch.manual_seed(0)
    model = Words()
    ids, y = torch.randint(40, (BATCH, 5)), torch.randn(T, BATCH).double()
    own = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    return model, ids[own], y[:, own]


def rows() -> list[Tensor]:
    """Return the gradients of what tasks share, (T, q, p) of matrices whose p columns are sketched, by torch."""
    model, *batch = words(0, 1)
    shared = [model.words.weight, model.layer.weight, model.scale]
    grads = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in model.losses(*batch, PLAIN)]
    of_words, of_layer, of_scale = map(torch.stack, zip(*grads, strict=True))
    return [of_words.transpose(1, 2), of_layer, of_scale.unsqueeze(-1)]


def sketched(
    rank: int, group: Any, ranks: int, finish: str, seeds: Sequence[int], is_sharded: bool = False
) -> list[Tensor]:
    """Return the Gramian of a step with each seed, the last weights, and the last gradients."""
    model, *batch = words(rank, ranks)
    if is_sharded:
        fully_shard(model, mesh=mesh_of(group, ranks, ""))
        register_fsdp_forward_method(model, "losses")
    params = list(model.parameters())
    found = []
    for seed in seeds:
        for p in params:
            p.grad = None
        way: dict[str, Any] = {"through": "activations", "finish": finish, "gramian": gk.Sketch(COLUMNS, seed)}
        losses = model.losses(*batch, PLAIN)
        info = gk.backward(losses, params, aggregator=gk.MGDA(), process_group=group, **way)
        assert info.gramian is not None
        assert info.weights is not None
        found.append(info.gramian)
    return [*found, info.weights, *(whole(p.grad) for p in params if p.grad is not None)]


@pytest.mark.parametrize(("finish", "is_sharded"), [("backward", False), ("kept", False), ("backward", True)])
def test_a_sketch_is_that_of_the_mean_gradients(pool: Pool, finish: str, is_sharded: bool) -> None:
    """The signs are those of seed, step and parameter, an embedding's too. All ranks have the same bits."""
    places = {name: k for k, (name, _) in enumerate(Words().named_parameters())}
    of_words, of_layer, of_scale = rows()
    X = [of_scale]
    for name, G in (("words.weight", of_words), ("layer.weight", of_layer)):
        X.append(G @ gk.Sketch(COLUMNS, 5).signs(places[name], G.shape[2], torch.float64, torch.device("cpu")))
    M = sum(x.flatten(1) @ x.flatten(1).T for x in X)
    of_ranks = pool.run(sketched, 4, finish, [5], is_sharded, ranks=4)
    for found in of_ranks:
        assert all(torch.equal(x, first) for x, first in zip(found, of_ranks[0], strict=True))
        torch.testing.assert_close(found[0], M, rtol=1e-12, atol=1e-12)  # sums of some hundred numbers below 1
    _, w, *grads = of_ranks[0]
    for k, G in ((places["words.weight"], of_words.transpose(1, 2)), (places["layer.weight"], of_layer)):
        torch.testing.assert_close(grads[k], torch.einsum("t,tqp->qp", w, G), rtol=1e-12, atol=1e-12)


def reported(rank: int, group: Any, ranks: int, finish: str) -> tuple[Tensor | None, Tensor | None]:
    """Return the Gramian of a sketch that reports its error, and the report."""
    model, *batch = words(rank, ranks)
    way: dict[str, Any] = {"through": "activations", "finish": finish, "gramian": gk.Sketch(1, 3, report=True)}
    info = gk.backward(model.losses(*batch, PLAIN), model, aggregator=gk.MGDA(), process_group=group, **way)
    return info.gramian, info.conflict_agreement


@pytest.mark.parametrize("finish", FINISH)
def test_a_report(pool: Pool, finish: str) -> None:
    """It compares with the Gramian of the mean gradients."""
    M = sum(G.flatten(1) @ G.flatten(1).T for G in rows())
    for found, agreement in pool.run(reported, 2, finish, ranks=2):
        agree = [(found[i, j] < 0) == (M[i, j] < 0) for i in range(T) for j in range(i)]
        torch.testing.assert_close(agreement, sum(agree) / 3)
        assert sum(agree) == 1  # by these signs


def test_a_sketch_is_unbiased(pool: Pool) -> None:
    """Its mean over 200 seeds is near, by the variance that the docstring of Sketch states, and so is the variance."""
    found = torch.stack(pool.run(sketched, 2, "backward", range(200), ranks=2)[0][:200])
    of_words, of_layer, of_scale = rows()
    M = sum(G.flatten(1) @ G.flatten(1).T for G in (of_words, of_layer, of_scale))
    lengths = [G.flatten(1).square().sum(1) for G in (of_words, of_layer)]
    variance = sum(2 * n.unsqueeze(1) * n / COLUMNS for n in lengths)
    assert ((found.mean(0) - M).abs() < 4 * (variance / 200).sqrt()).all()  # four standard errors
    assert (found.var(0) < 1.5 * variance).all()  # a variance of 200 numbers is off by a tenth, or a fifth in the tail
    assert (found.var(0).diagonal() > variance.diagonal() / 3).all()


WIDTH = 96


def sent(rank: int, group: Any, finish: str, columns: int | None) -> tuple[int, int]:
    """Return the float32 words that a step sends, and the number of all parameters."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    h = trunk(torch.randn(4, WIDTH))
    losses = [(h * (t + 1)).square().mean() for t in range(T)]
    sketch = None if columns is None else gk.Sketch(columns, 0)
    way: dict[str, Any] = {"through": "activations", "finish": finish, "gramian": sketch}
    with Counted() as counted:
        gk.backward(losses, trunk, aggregator=gk.PCGrad(), process_group=group, **way)
    return counted.words(), sum(p.numel() for p in trunk.parameters())


@pytest.mark.parametrize("finish", FINISH)
def test_the_words_sent(pool: Pool, finish: str) -> None:
    """Exactly T + 2 for each parameter; a sketch sends ``columns`` for each row of a weight, and biases as they are."""
    for words_sent, P in pool.run(sent, finish, None, ranks=4):
        assert words_sent == (T + 2) * P
    for words_sent, P in pool.run(sent, finish, 8, ranks=4):
        assert words_sent == T * 2 * (WIDTH * 8 + WIDTH) + 2 * P


class Raising(torch.autograd.Function):
    """Passes on its input, and its gradient, but for the call with a number, which raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, calls: list[int]) -> Tensor:
        """Keep how many calls of backward are left."""
        ctx.calls = calls
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        """Raise if no call is left."""
        ctx.calls[0] -= 1
        if ctx.calls[0] < 0:
            raise KeyError("the layer of rank 1")
        return g, None


class Step:
    """A step of one rank, which a fault changes before it is taken."""

    def __init__(self, rank: int, finish: str) -> None:
        self.rank = rank
        self.model, self.ids, self.y = words(rank, 2)
        self.method = gk.GradVac()
        self.sketch: gk.Sketch | None = gk.Sketch(COLUMNS, 3)
        self.finish = finish
        self.at = list(PLAIN)
        self.patch = pytest.MonkeyPatch()

    def take(self, group: Any) -> gk.SurgeryInfo:
        """Take the step."""
        way: dict[str, Any] = {"through": "activations", "finish": self.finish, "gramian": self.sketch}
        losses = self.model.losses(self.ids, self.y, self.at)
        return gk.backward(losses, self.model, aggregator=self.method, process_group=group, **way)

    def raise_at(self, place: int, calls: int) -> None:
        """Let rank 1 raise in a backward pass, after some that do not."""
        if self.rank == 1:
            left = [calls]
            self.at[place] = lambda x: Raising.apply(x, left)


def the_last_layer_raises(step: Step) -> None:
    step.raise_at(2, 0)


def a_layer_raises_for_the_second_task(step: Step) -> None:
    step.raise_at(1, 1)


def the_first_layer_raises(step: Step) -> None:
    step.raise_at(0, 0)


def the_first_layer_raises_in_the_last_pass(step: Step) -> None:
    step.raise_at(0, T)


def a_sum_of_dot_products_raises(step: Step) -> None:
    def raising(*_: Any) -> Tensor:
        raise KeyError("no memory")

    if step.rank == 1:
        step.patch.setattr("gradkern.step.mean_gramians.sketched_rows", raising)


def a_combination_raises(step: Step) -> None:
    def raising(*_: Any) -> Tensor:
        raise KeyError("no memory")

    if step.rank == 1:
        step.patch.setattr("gradkern.step.activation_rows.weighted_grad", raising)


def a_layer_is_used_in_another_way(step: Step) -> None:
    if step.rank == 1:
        step.at[2] = lambda h: h + step.model.layer.weight.sum(1)


def a_layer_is_detached(step: Step) -> None:
    if step.rank == 1:
        step.at[0] = torch.detach


def another_seed(step: Step) -> None:
    step.sketch = gk.Sketch(COLUMNS, step.rank)


def a_step_more(step: Step) -> None:
    assert step.sketch is not None
    if step.rank == 1:
        step.sketch.advance()


def no_sketch(step: Step) -> None:
    if step.rank == 1:
        step.sketch = None


def another_finish(step: Step) -> None:
    if step.rank == 1:
        step.finish = "kept" if step.finish == "backward" else "backward"


RAISED = r"KeyError: .*the layer of rank 1|RuntimeError: .* because rank 1 raised KeyError: .*the layer of rank 1"
NO_MEMORY = r"KeyError: 'no memory'|RuntimeError: .* because rank 1 raised KeyError: 'no memory'"
OTHER_WAY = "ValueError: .*through, finish, gramian or per_example"
FAULTS: dict[Callable[[Step], None], str] = {
    the_last_layer_raises: RAISED,
    a_layer_raises_for_the_second_task: RAISED,
    the_first_layer_raises: RAISED,
    a_sum_of_dot_products_raises: NO_MEMORY,
    a_layer_is_used_in_another_way: "ValueError: .*which params several losses reach, or the layers that use them",
    a_layer_is_detached: "ValueError: .*which params several losses reach, or the layers that use them",
    another_seed: OTHER_WAY,
    a_step_more: OTHER_WAY,
    no_sketch: OTHER_WAY,
    another_finish: OTHER_WAY,
}
"""Faults, and what all ranks raise."""


class Raised(NamedTuple):
    """What a step has raised, whether all is as before, and the Gramian of the step after."""

    text: str
    untouched: bool
    gramian: Tensor | None


def with_fault(rank: int, group: Any, name: str, finish: str) -> Raised:
    """Take a step with a fault, if it has a name, and then a right one, with a new group of the same ranks."""
    forget(group)
    step, text, untouched = Step(rank, finish), "", True
    for p in step.model.parameters():
        p.grad = torch.ones_like(p)
    if name:
        globals()[name](step)
        sketch, before = step.sketch, [step.method.state_dict(), step.sketch and step.sketch.state_dict()]
        try:
            step.take(group)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        after = [step.method.state_dict(), sketch and sketch.state_dict()]
        grads = [p.grad for p in step.model.parameters() if p.grad is not None]
        untouched = str(before) == str(after) and all(bool((g == 1).all()) for g in grads)
        step.patch.undo()
        right = Step(rank, finish)
        right.model = step.model
        step = right
    return Raised(text, untouched, step.take(group).gramian)


@pytest.mark.parametrize("finish", FINISH)
def test_all_ranks_raise_and_the_next_step_works(pool: Pool, finish: str) -> None:
    right = pool.run(with_fault, "", finish, ranks=2)[0].gramian
    last = the_first_layer_raises_in_the_last_pass if finish == "backward" else a_combination_raises
    for fault, text in {**FAULTS, last: RAISED if finish == "backward" else NO_MEMORY}.items():
        for raised in pool.run(with_fault, fault.__name__, finish, ranks=2):
            assert re.match(text, raised.text, re.DOTALL), (fault.__name__, raised.text)
            assert raised.untouched, fault.__name__
            assert torch.equal(raised.gramian, right), fault.__name__


def looking_for_unused(rank: int, group: Any, finish: str) -> str:
    """Take a step with a model whose wrapper makes all losses by one node; return the error."""
    torch.manual_seed(0)
    model = Net(T).double()
    forward = DistributedDataParallel(model, process_group=group, find_unused_parameters=True)
    *losses, _ = forward(torch.randn(8, 6).double(), torch.randn(T, 8).double())
    way: dict[str, Any] = {"through": "activations", "finish": finish}
    with pytest.raises((ValueError, RuntimeError)) as raised:
        gk.backward(losses, list(model.parameters()), aggregator=gk.PCGrad(), process_group=group, **way)
    assert all(p.grad is None for p in model.parameters())
    return str(raised.value)


@pytest.mark.parametrize("finish", FINISH)
def test_one_node_of_all_losses_is_refused(pool: Pool, finish: str) -> None:
    """It would put the heads under surgery, which have a gradient of one task each."""
    for text in pool.run(looking_for_unused, finish, ranks=2):
        assert "find_unused_parameters=False" in text


def one_raises(rank: int, group: Any) -> tuple[str, bool]:
    """Take a step in which rank 1 raises in the second task's pass; return the error, and whether it wrote nothing."""
    model, *batch = words(rank, 2)
    fully_shard(model, mesh=mesh_of(group, 2, ""))
    register_fsdp_forward_method(model, "losses")
    params, left = list(model.parameters()), [1 if rank == 1 else 100]
    losses = model.losses(*batch, [torch.clone, lambda x: Raising.apply(x, left), torch.clone])
    try:
        gk.backward(losses, params, aggregator=gk.PCGrad(), process_group=group, through="activations")
    except Exception as error:
        return f"{type(error).__name__}: {error}", all(p.grad is None for p in params)
    return "", False


def test_a_rank_that_raises_where_weights_are_gathered_does_so_at_once(tmp_path: Path) -> None:
    """The others raise by the timeout of the process group."""
    pool = Pool(2, tmp_path, timeout=4)
    try:
        (other, *other_is_right), (own, *own_is_right) = pool.run(one_raises, ranks=2, seconds=40)
    finally:
        pool.close()
    assert own == "KeyError: 'the layer of rank 1'"
    assert other.startswith(("RuntimeError", "DistBackendError"))
    assert (other_is_right, own_is_right) == ([True], [True])


def refused(rank: int, group: Any, sharding: str, finish: str) -> str:
    """Take a step through activations that is refused, and then one through rows; return the error."""
    torch.manual_seed(0)
    model = Net(T, 12).double()
    SHARDINGS[sharding](model, mesh_of(group, 4, sharding))
    params = list(model.named_parameters())
    *losses, _ = model(torch.ones(8, 6).double(), torch.ones(T, 8).double())
    step: dict[str, Any] = {"aggregator": gk.PCGrad(), "process_group": group}
    with pytest.raises(NotImplementedError) as raised:
        gk.backward(losses, params, through="activations", finish=finish, **step)
    assert all(p.grad is None for _, p in params)
    gk.backward(losses, params, **step)
    return str(raised.value)


@pytest.mark.parametrize(
    ("sharding", "finish", "text"),
    [
        ("resharded", "kept", "finish='kept' is not for DTensors in params yet: give through='rows'"),
        ("tensor parallel", "backward", "'trunk.0.weight' of shape .* is another one: give through='rows'"),
        ("tensor parallel shards", "backward", "'trunk.0.weight' of shape .* is another one: give through='rows'"),
    ],
)
def test_other_sharded_parameters_are_refused(pool: Pool, sharding: str, finish: str, text: str) -> None:
    for raised in pool.run(refused, sharding, finish, ranks=4):
        assert re.search(text, raised), raised
