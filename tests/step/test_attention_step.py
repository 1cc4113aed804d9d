"""GradAttention in a step: which entries it is shown, and what its weights are applied to."""

import copy
import io
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import gradkern as gk
from tests.models import MultiHead, flat, problem, task_gradients
from tests.tolerances import TOLERANCES, assert_near

SUBSET = 20
MODULES = [("trunk.0.weight", "trunk.0.bias"), ("trunk.2.weight", "trunk.2.bias")]


def method(update: str, subset: int = SUBSET) -> gk.GradAttention:
    torch.manual_seed(5)
    return gk.GradAttention(subset, 8, 1, update, generator=torch.Generator().manual_seed(1))


@cache
def trained(update: str) -> gk.GradAttention:
    """After some steps, so that the weights are not all equal: to be copied."""
    trained = method(update)
    G = torch.randn(3, SUBSET) + torch.tensor([[1.0], [1.0], [-1.0]])
    for _ in range(40):
        trained.weights(G @ G.T, G)
    return trained


def members(model: MultiHead, groups: str) -> list[list[Tensor]]:
    """The parameters of each group of the trunk."""
    named = dict(model.named_parameters())
    if groups == "model":
        return [list(model.trunk.parameters())]
    return [[named[name] for name in names] for names in MODULES]


@pytest.mark.parametrize("groups", ["model", "module"])
@pytest.mark.parametrize("update", ["all", "subset"])
def test_a_step_on_losses_is_the_step_on_the_matrix(update: str, groups: str, back_end: str) -> None:
    """Each group of parameters, one after another, is a segment of the matrix of their gradients."""
    model, x, y = problem()
    losses = model.losses(x, y)
    params = [p for group in members(model, groups) for p in group]
    J = torch.stack([flat(g, params) for g in task_gradients(losses, params)]).float()
    ends = torch.tensor([sum(p.numel() for p in group) for group in members(model, groups)]).cumsum(0)
    offsets = None if groups == "model" else torch.cat((torch.zeros(1, dtype=torch.int64), ends))
    expected = copy.deepcopy(trained(update))(J, offsets)
    info = gk.backward(losses, model, aggregator=copy.deepcopy(trained(update)), groups=groups, retain_graph=True)
    # 10: weights from float32 Gramians, by way of cosines.
    assert_near(flat([p.grad for p in params], params), expected, J.abs().max(), 10 * TOLERANCES[torch.float32])
    assert info.attention is not None
    attention = info.attention[:2] if groups == "module" else info.attention
    assert_near(attention.sum(-1), torch.ones(attention.shape[:-1]), 1.0, 1e-6)  # float32
    assert not torch.allclose(attention, torch.full_like(attention, 1 / 3))
    if update == "subset":
        drawn = flat([p.grad for p in params], params) != 0
        assert drawn.sum() == SUBSET * (1 if groups == "model" else 2)
    for t, head in enumerate(model.heads):
        plain = task_gradients([losses[t]], list(head.parameters()))[0]
        assert all(torch.equal(p.grad, g) for p, g in zip(head.parameters(), plain, strict=True))


def losses_of(parameters: Sequence[Tensor]) -> list[Tensor]:
    x = torch.linspace(-1, 1, 7)
    return [
        sum(((k + t) * p.float() * x[: p.numel()].view_as(p)).sum() for k, p in enumerate(parameters)) for t in (1, 2)
    ]


@pytest.mark.parametrize("update", ["all", "subset"])
def test_several_dtypes(update: str, back_end: str) -> None:
    """What is drawn is numbered through all of them; bfloat16 rounds what it stores, nothing more."""
    grads = []
    for dtypes in ((torch.float32,) * 3, (torch.float32, torch.bfloat16, torch.float64)):
        parameters = [nn.Parameter(torch.ones(n, dtype=d)) for n, d in zip((7, 4, 6), dtypes, strict=True)]
        gk.backward(losses_of(parameters), parameters, aggregator=method(update, 9))
        grads.append(flat([p.grad for p in parameters], parameters))
        assert [p.grad.dtype for p in parameters if p.grad is not None] == list(dtypes)
    assert_near(grads[1], grads[0], grads[0].abs().max(), TOLERANCES[torch.bfloat16])
    assert torch.equal(grads[0] == 0, grads[1] == 0)


@pytest.mark.parametrize("update", ["all", "subset"])
def test_sparse_gradients(update: str) -> None:
    grads = []
    for sparse in (False, True):
        torch.manual_seed(0)
        embedding = nn.Embedding(20, 3, sparse=sparse)
        out = embedding(torch.tensor([1, 2, 1, 7, 19]))
        losses = [out.sum(), -(out * torch.randn(5, 3)).sum()]
        gk.backward(losses, embedding, aggregator=method(update))
        assert embedding.weight.grad is not None
        assert embedding.weight.grad.is_sparse == (sparse and update == "all")
        grads.append(embedding.weight.grad.to_dense())
    assert_near(grads[1], grads[0], grads[0].abs().max(), TOLERANCES[torch.float32])


def test_sparse_gradients_of_one_task_stay_sparse() -> None:
    embedding, trunk = nn.Embedding(20, 3, sparse=True), nn.Linear(3, 3)
    losses = [trunk(embedding(torch.tensor([1, 7]))).sum(), trunk(torch.ones(3)).square().sum()]
    for update in ("all", "subset"):
        embedding.weight.grad = None
        model = nn.ModuleList([embedding, trunk])
        gk.backward(losses, model, aggregator=method(update), retain_graph=True)
        assert embedding.weight.grad is not None
        assert embedding.weight.grad.is_sparse


def test_where_nothing_is_shared_the_network_learns_nothing() -> None:
    model, x, y = problem()
    attention = method("all")
    before = [p.clone() for p in attention.parameters()]
    info = gk.backward([model.loss(0, x, y), None, None], model, aggregator=attention)
    assert torch.equal(info.weights, torch.full((3,), 1 / 3))
    assert all(torch.equal(p, b) for p, b in zip(attention.parameters(), before, strict=True))


@pytest.mark.parametrize("update", ["all", "subset"])
def test_resumed_it_goes_on_exactly(update: str) -> None:
    def start() -> tuple[MultiHead, gk.SurgeryOptimizer, Tensor, Tensor]:
        model, x, y = problem()
        inner = torch.optim.Adam(model.named_parameters(), lr=0.05)
        return model, gk.SurgeryOptimizer(inner, method(update)), x, y

    def train(model: MultiHead, opt: gk.SurgeryOptimizer, x: Tensor, y: Tensor) -> None:
        for _ in range(3):
            opt.zero_grad()
            opt.backward(model.losses(x, y))
            opt.step()

    model, opt, x, y = start()
    train(model, opt, x, y)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    train(model, opt, x, y)
    other, resumed, *_ = start()
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["opt"])
    train(other, resumed, x, y)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_step_that_overflows_leaves_the_network_alone() -> None:
    model, x, y = problem()
    attention = copy.deepcopy(trained("all"))
    before = [p.clone() for p in attention.parameters()]
    losses = model.losses(x, y)
    gk.backward([losses[0] * torch.inf, *losses[1:]], model, aggregator=attention)
    assert all(torch.equal(p, b) for p, b in zip(attention.parameters(), before, strict=True))
