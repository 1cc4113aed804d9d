"""Steps whose gradients of embeddings are the rows that occur, compared with torch's own gradients."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradkern as gk
from bench.memory import peak
from gradkern import reference
from gradkern.gradients import embeddings
from gradkern.step import flat_rows
from tests.models import flat, task_gradients

T, V, D = 3, 40, 8
TOLERANCE = 1e-12
"""Of float64 sums over tokens and tasks in another order, a few roundings of numbers around 1."""


@pytest.fixture(autouse=True)
def _compact_if_small(monkeypatch: pytest.MonkeyPatch, float64_by_default: None) -> Iterator[None]:
    """Look for embeddings of any size, and let no small model's rows be a matrix."""
    monkeypatch.setattr(embeddings, "LEAST", 1)
    monkeypatch.setattr(flat_rows, "LARGEST", 0)
    embeddings._in_vain.clear()
    yield
    embeddings._in_vain.clear()


@pytest.fixture
def compacted(monkeypatch: pytest.MonkeyPatch) -> list[set[Tensor]]:
    """Give the sets of embeddings whose gradients were compact, one for each step."""
    seen: list[set[Tensor]] = []
    before = embeddings.Compact.__init__

    def noting(self: embeddings.Compact, targets: Sequence[Tensor]) -> None:
        before(self, targets)
        seen.append(self.params)

    monkeypatch.setattr(embeddings.Compact, "__init__", noting)
    return seen


class Model(nn.Module):
    """An embedding, a layer, and a head for each task.

    Args:
        look_up: returns the vectors of ids (B, L), with the embedding's weight; None for the layer itself.
        options: of the embedding.
    """

    def __init__(self, look_up: Callable[[nn.Embedding, Tensor], Tensor] | None = None, **options: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(V, D, **options)
        self.layer = nn.Linear(D, D)
        self.heads = nn.ModuleList(nn.Linear(D, 1) for _ in range(T))
        self.look_up = look_up

    def loss(self, t: int, ids: Tensor) -> Tensor:
        """Return the loss of task t."""
        h = self.words(ids) if self.look_up is None else self.look_up(self.words, ids)
        return (self.heads[t](torch.tanh(self.layer(h)).mean(1)) - t).square().mean()


def batch(t: int, shape: tuple[int, int] = (4, 3)) -> Tensor:
    """Return a task's ids, in which some repeat, 0 among them."""
    ids = torch.randint(V, shape, generator=torch.Generator().manual_seed(t))
    ids[0, :2] = 7 + t
    ids[-1, -1] = 0
    return ids


def twice(words: nn.Embedding, ids: Tensor) -> Tensor:
    return words(ids) * words(ids.flip(1))


def checkpointed(words: nn.Embedding, ids: Tensor) -> Tensor:
    return checkpoint(lambda: torch.sin(words(ids)), use_reentrant=False)


def tied(words: nn.Embedding, ids: Tensor) -> Tensor:
    h = words(ids)
    return h + 0.1 * (h @ words.weight.t()).softmax(-1) @ torch.ones(V, D)


def in_bags(words: nn.Embedding, ids: Tensor) -> Tensor:
    return F.embedding_bag(ids, words.weight).unsqueeze(1)


MODELS: dict[str, tuple[Callable[[], Model], bool]] = {
    "plain": (Model, True),
    "padding": (lambda: Model(padding_idx=0), True),
    "padding from the end": (lambda: Model(padding_idx=-1), True),
    "max_norm": (lambda: Model(max_norm=1.0), True),
    "twice": (lambda: Model(twice), True),
    "functional": (lambda: Model(lambda words, ids: F.embedding(ids.int(), words.weight)), True),
    "checkpointed": (lambda: Model(checkpointed), True),
    "tied to an output": (lambda: Model(tied), False),
    "scaled by frequency": (lambda: Model(scale_grad_by_freq=True), False),
    "bags": (lambda: Model(in_bags), False),
}
"""Models, and whether their embedding's gradients are compact."""


def losses_of(model: Model, shared: bool) -> list[Tensor]:
    return [model.loss(t, batch(0 if shared else t)) for t in range(T)]


def rows_of(model: Model, shared: bool) -> tuple[list[nn.Parameter], Tensor]:
    """Return the parameters of the trunk, and torch's own gradients of each task by them, (T, P)."""
    trunk = [model.words.weight, *model.layer.parameters()]
    grads = task_gradients(losses_of(model, shared), trunk)
    return trunk, torch.stack([flat(row, trunk) for row in grads])


@pytest.mark.parametrize("way", ["losses", "callables", "features"])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_that_of_whole_gradients(compacted: list[set[Tensor]], name: str, way: str) -> None:
    make, is_compact = MODELS[name]
    torch.manual_seed(0)
    model = make()
    shared = way == "features"
    trunk, J = rows_of(model, shared)
    kwargs: dict[str, Any] = {}
    losses: Sequence[Any] = losses_of(model, shared)
    if way == "callables":
        losses = [lambda t=t: model.loss(t, batch(t)) for t in range(T)]
    if way == "features":
        ids = batch(0)
        h = model.words(ids) if model.look_up is None else model.look_up(model.words, ids)
        h = torch.tanh(model.layer(h)).mean(1)
        losses, kwargs = [(head(h) - t).square().mean() for t, head in enumerate(model.heads)], {"features": h}
    info = gk.backward(losses, model, aggregator=gk.PCGrad(order=range(T)), **kwargs)
    torch.testing.assert_close(info.gramian, J @ J.T, rtol=TOLERANCE, atol=TOLERANCE)
    expected = torch.stack(reference.pcgrad(J, [range(T)] * T)).sum(0)
    assert not model.words.weight.grad.is_sparse
    assert model.words.weight.grad.is_contiguous()
    torch.testing.assert_close(flat([p.grad for p in trunk], trunk), expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert compacted == [{model.words.weight} if is_compact else set()]


def test_a_sparse_layer_keeps_its_sparse_gradients() -> None:
    model = Model(sparse=True)
    trunk = [model.words.weight, *model.layer.parameters()]
    rows = task_gradients(losses_of(model, False), trunk)
    J = torch.stack([flat([g.to_dense() for g in row if g is not None], trunk) for row in rows])
    info = gk.backward(losses_of(model, False), model, aggregator=gk.MGDA())
    assert model.words.weight.grad.is_sparse
    torch.testing.assert_close(info.gramian, J @ J.T, rtol=TOLERANCE, atol=TOLERANCE)


def test_groups_and_what_is_in_grad_already() -> None:
    model = Model()
    trunk, J = rows_of(model, False)
    for p in trunk:
        p.grad = torch.ones_like(p)
    info = gk.backward(
        losses_of(model, False), list(model.named_parameters()), aggregator=gk.MGDA(), groups="parameter"
    )
    n = V * D
    torch.testing.assert_close(info.gramian[0], J[:, :n] @ J[:, :n].T, rtol=TOLERANCE, atol=TOLERANCE)
    expected = 1 + (info.weights[0] @ J[:, :n]).view(V, D)
    torch.testing.assert_close(model.words.weight.grad, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_an_embedding_of_one_task(compacted: list[set[Tensor]]) -> None:
    model, other = Model(), nn.Embedding(V, 1)
    losses = losses_of(model, False)
    losses[1] = losses[1] + other(batch(1)).square().mean()
    (expected,) = torch.autograd.grad(losses[1], [other.weight], retain_graph=True)
    gk.backward(losses, [*model.parameters(), other.weight], aggregator=gk.PCGrad())
    torch.testing.assert_close(other.weight.grad, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert compacted == [{model.words.weight, other.weight}]


@pytest.mark.parametrize("absent", [0, 2])
def test_a_task_that_is_absent_or_reaches_none(absent: int) -> None:
    model = Model()
    trunk, J = rows_of(model, False)
    losses: list[Any] = losses_of(model, False)
    losses[absent] = None
    other = 1
    losses[other] = (model.heads[other](torch.tanh(model.layer(torch.ones(2, D)))) - 1).square().mean()
    row = flat(task_gradients([losses[other]], trunk)[0], trunk)
    J = J.clone()
    J[absent], J[other] = 0, row
    info = gk.backward(losses, model, aggregator=gk.MGDA(), shared=trunk)
    torch.testing.assert_close(info.gramian, J @ J.T, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(flat([p.grad for p in trunk], trunk), info.weights @ J, rtol=TOLERANCE, atol=TOLERANCE)


def test_layers_with_more_tokens_than_rows_are_whole(compacted: list[set[Tensor]]) -> None:
    model = Model()
    losses = [model.loss(t, batch(t, (V // 4, 4))) for t in range(T)]
    gk.backward(losses, model, aggregator=gk.PCGrad())
    assert compacted == [set()]


def test_as_many_tokens_of_all_tasks_as_rows() -> None:
    """Each task has fewer tokens than the embedding has rows, and all together have more."""
    model = Model()
    losses = [model.loss(t, batch(t, (5, 5))) for t in range(T)]
    J = torch.stack([flat(row, [model.words.weight]) for row in task_gradients(losses, [model.words.weight])])
    info = gk.backward(losses, [model.words.weight], aggregator=gk.UPGrad())
    torch.testing.assert_close(info.gramian, J @ J.T, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_hook_on_the_parameter_sees_whole_gradients(compacted: list[set[Tensor]]) -> None:
    model = Model()
    shapes = []
    model.words.weight.register_hook(lambda g: shapes.append((g.shape, g.is_sparse)))
    gk.backward(losses_of(model, False), model, aggregator=gk.PCGrad())
    assert shapes == [((V, D), False)] * T
    assert compacted == [set()]


def test_a_callable_adds_a_hook(compacted: list[set[Tensor]]) -> None:
    model = Model()

    def loss(t: int) -> Tensor:
        if t == 1:
            model.words.weight.register_hook(lambda g: -g)
        return model.loss(t, batch(t))

    signs = [1.0, -1.0, -1.0]
    rows = [torch.autograd.grad(loss, model.words.weight)[0] for loss in losses_of(model, False)]
    gk.backward([lambda t=t: loss(t) for t in range(T)], model, aggregator=gk.UPGrad(), shared=[model.layer.weight])
    expected = sum(sign * g for sign, g in zip(signs, rows, strict=True))
    torch.testing.assert_close(model.words.weight.grad, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert compacted == [{model.words.weight}]


def test_a_callable_freezes_after_its_forward_pass() -> None:
    """Torch has no gradient of a parameter that is frozen when the backward pass runs."""
    model = Model()
    rows = [torch.autograd.grad(loss, model.words.weight)[0] for loss in losses_of(model, False)]

    def loss(t: int) -> Tensor:
        value = model.loss(t, batch(t))
        model.words.weight.requires_grad_(t < 2)
        return value

    gk.backward([lambda t=t: loss(t) for t in range(T)], model, aggregator=gk.UPGrad(), shared=[model.layer.weight])
    torch.testing.assert_close(model.words.weight.grad, rows[0] + rows[1], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("update", [False, True])
def test_a_weight_that_is_turned(compacted: list[set[Tensor]], update: bool) -> None:
    """Its numbers lie column by column, and so do those of ``.grad``."""
    model, copy = Model(), Model()
    copy.load_state_dict(model.state_dict())
    model.words.weight = nn.Parameter(torch.randn(D, V).t())
    copy.words.weight = nn.Parameter(model.words.weight.detach().contiguous())
    for m, inner in ((model, gk.optim.AdamW), (copy, torch.optim.AdamW)):
        opt = gk.SurgeryOptimizer(inner(m.parameters(), lr=0.1), gk.PCGrad(order=range(T)))
        if update:
            opt.update(losses_of(m, False))
        else:
            opt.backward(losses_of(m, False))
            assert m.words.weight.grad.stride() == m.words.weight.stride()
            opt.step()
    for p, q in zip(model.parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)  # AdamW's step multiplies rounding errors
    assert compacted[0] == set()


def test_nested_ids(compacted: list[set[Tensor]]) -> None:
    words, heads = nn.Embedding(V, D), [nn.Linear(D, 1) for _ in range(T)]

    def losses() -> list[Tensor]:
        nested = [torch.nested.nested_tensor([batch(t)[0], batch(0)[1, :2]], layout=torch.jagged) for t in range(T)]
        return [head(words(ids).values()).square().mean() for head, ids in zip(heads, nested, strict=True)]

    params = [words.weight, *(p for head in heads for p in head.parameters())]
    J = torch.stack([flat(row, [words.weight]) for row in task_gradients(losses(), [words.weight])])
    info = gk.backward(losses(), params, aggregator=gk.UPGrad())
    torch.testing.assert_close(info.gramian, J @ J.T, rtol=TOLERANCE, atol=TOLERANCE)
    assert compacted == [set()]


def test_a_weight_with_gaps_is_refused_by_adamw() -> None:
    model = Model()
    model.words.weight = nn.Parameter(torch.randn(V, 2 * D)[:, :D])
    opt = gk.SurgeryOptimizer(gk.optim.AdamW(model.parameters()), gk.PCGrad())
    with pytest.raises(ValueError, match="gaps between its numbers"):
        opt.update(losses_of(model, False))


@pytest.mark.parametrize("options", ["suppression", "memory", "entries", "averages"])
def test_steps_that_need_whole_gradients(compacted: list[set[Tensor]], options: str) -> None:
    model = Model()
    kwargs: dict[str, Any] = {
        "suppression": {"aggregator": gk.PCGrad(), "suppression": gk.Suppression(0.5)},
        "memory": {"aggregator": gk.PCGrad(), "memory": True},
        "entries": {"aggregator": gk.GradDrop()},
        "averages": {"aggregator": gk.MoCo()},
    }[options]
    opt = gk.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **kwargs)
    opt.backward(losses_of(model, False))
    assert not model.words.weight.grad.is_sparse
    assert compacted == []


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_update_steps_the_whole_embedding(compacted: list[set[Tensor]], dtype: torch.dtype, scaled: bool) -> None:
    """Rows that do not occur move too: by their moments, and by weight decay."""
    torch.manual_seed(0)
    model = Model(padding_idx=0).to(dtype)
    copy = Model(padding_idx=0).to(dtype)
    copy.load_state_dict(model.state_dict())
    fused = gk.SurgeryOptimizer(gk.optim.AdamW(model.parameters(), lr=0.1), gk.MGDA())
    plain = torch.optim.AdamW(copy.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if scaled else None
    for step in range(3):
        ids = [batch(10 * step + t) for t in range(T)]
        losses = [model.loss(t, ids[t]) for t in range(T)]
        given = losses if scaler is None else [scaler.scale(loss) for loss in losses]
        info = fused.update(given, max_norm=0.5, scaler=scaler)
        if scaler is not None:
            scaler.update()
        plain.zero_grad()
        trunk = [copy.words.weight, *copy.layer.parameters()]
        for t in range(T):
            loss = copy.loss(t, ids[t])
            for p, g in zip(trunk, torch.autograd.grad(loss, trunk, retain_graph=True), strict=True):
                p.grad = info.weights[t] * g if p.grad is None else p.grad + info.weights[t] * g
            for p, g in zip(
                copy.heads[t].parameters(), torch.autograd.grad(loss, list(copy.heads[t].parameters())), strict=True
            ):
                p.grad = g
        torch.nn.utils.clip_grad_norm_(copy.parameters(), 0.5)
        plain.step()
    for p, q in zip(model.parameters(), copy.parameters(), strict=True):
        # AdamW divides by roots of squares, which multiplies rounding errors of small gradients.
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9 if dtype == torch.float64 else 2e-3)
    assert compacted == [{model.words.weight}] * 3


def test_bfloat16_is_rounded_once(compacted: list[set[Tensor]]) -> None:
    torch.manual_seed(0)
    model = Model().bfloat16()
    words = model.words.weight
    grads = [torch.autograd.grad(model.loss(t, batch(t)), words)[0].double() for t in range(T)]
    info = gk.backward(losses_of(model, False), model, aggregator=gk.MGDA())
    expected = sum(w * g for w, g in zip(info.weights, grads, strict=True))
    assert words.grad.dtype == torch.bfloat16
    # Entries of torch's gradients are rounded to 2^-8 where ids repeat, and so is the result.
    torch.testing.assert_close(words.grad.double(), expected, rtol=2**-7, atol=2**-8 * float(expected.abs().max()))
    assert compacted == [{words}]


def test_it_takes_no_memory_for_whole_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """T whole gradients of the embedding are not there at any time; the result is."""
    words, head = nn.Embedding(4000, 64), nn.Linear(64, 1)
    params = [words.weight, *head.parameters()]
    ids = [torch.randint(4000, (4, 8)) for _ in range(T)]

    def step() -> None:
        words.weight.grad = head.weight.grad = head.bias.grad = None
        gk.backward(
            [lambda t=t: (head(words(ids[t])) - t).square().mean() for t in range(T)], params, aggregator=gk.MGDA()
        )

    step()
    of_one = words.weight.nbytes
    assert peak(step, "cpu") < 1.25 * of_one
    monkeypatch.setattr(embeddings, "LEAST", 1 << 40)
    step()
    assert peak(step, "cpu") > T * of_one


def test_a_model_without_embeddings_is_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    searches = []
    uses = embeddings.graph.uses
    monkeypatch.setattr(embeddings.graph, "uses", lambda outputs: searches.append(outputs) or uses(outputs))
    model = Model(in_bags)
    for _ in range(3):
        gk.backward(losses_of(model, False), model, aggregator=gk.PCGrad())
    assert len(searches) == T


def test_the_host_reads_no_numbers(compacted: list[set[Tensor]]) -> None:
    """Tensors of FakeTensorMode have none."""
    with FakeTensorMode():
        model = Model(padding_idx=0)
        opt = gk.SurgeryOptimizer(gk.optim.AdamW(model.parameters()), gk.UPGrad())
        for update in (False, True):
            losses = [model.loss(t, torch.zeros(4, 3, dtype=torch.long)) for t in range(T)]
            if update:
                opt.update(losses, max_norm=1.0)
            else:
                opt.backward(losses)
                assert model.words.weight.grad.shape == (V, D)
                opt.zero_grad()
    assert compacted == [{model.words.weight}] * 2
