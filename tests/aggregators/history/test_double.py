"""MoDo and SDMGrad, whose weights move along the gradients of two batches, and ``second=`` of a step."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchjd", reason="compares with TorchJD")

from torchjd.aggregation import MoDoWeighting, SDMGradWeighting

import gradkern as gk
from gradkern import reference
from gradkern.aggregators.history.double import DoubleSampling
from tests.models import MultiHead, flat, problem, task_gradients
from tests.problems import conflicting
from tests.tolerances import assert_near

METHODS: dict[str, type[DoubleSampling]] = {"modo": gk.MoDo, "sdmgrad": gk.SDMGrad}
each_method = pytest.mark.parametrize("name", METHODS)
SIZES = [1, 2, 3, 8, 20, 40]


def pair(T: int, P: int = 60) -> tuple[Tensor, Tensor]:
    """Gradients of two batches: the same with other noise."""
    torch.manual_seed(T)
    J = conflicting(T, P).double()
    return J + 0.1 * torch.randn_like(J), J + 0.1 * torch.randn_like(J)


@pytest.mark.parametrize("T", SIZES)
def test_modo_as_torchjd(T: int) -> None:
    ours, its = gk.MoDo(gamma=0.01, rho=0.2), MoDoWeighting(gamma=0.01, rho=0.2)
    for k in range(4):
        A, B = pair(T)
        M = (A + k) @ B.mT / T
        assert_near(ours.weights(M), its(M), 1.0, 1e-9)


@pytest.mark.parametrize("T", SIZES)
def test_sdmgrad_as_torchjd(T: int) -> None:
    """Products around 1, beside which the 1e-8 that TorchJD adds is lost in 1e-6."""
    options = {"lr": 0.1, "momentum": 0.3, "n_iter": 7}  # a rate at which no rounding grows
    ours, its = gk.SDMGrad(lamb=0.4, **options), SDMGradWeighting(lambda_=0.4, **options)
    for k in range(4):
        A, B = pair(T)
        M = (A + k) @ B.mT
        assert_near(ours.weights(M), its(M), 1.0, 1e-6)


def test_the_defaults_are_those_of_torchjd() -> None:
    modo, sdmgrad = MoDoWeighting(), SDMGradWeighting()
    assert repr(gk.MoDo()) == f"MoDo(gamma={modo.gamma}, rho={modo.rho})"
    given = f"lamb={sdmgrad.lambda_}, lr={sdmgrad.lr}, momentum={sdmgrad.momentum}, n_iter={sdmgrad.n_iter}"
    assert repr(gk.SDMGrad()) == f"SDMGrad({given})"


def test_without_a_scale_the_weights_stay() -> None:
    method = gk.SDMGrad()
    assert torch.equal(method.weights(-torch.eye(2).double()), torch.full((2,), 0.5).double())


@each_method
def test_absent_tasks_are_left_out_and_wait(name: str) -> None:
    A, B = pair(4)
    M = (A @ B.mT).unsqueeze(0)
    present = torch.tensor([True, False, True, True])
    method, alone = METHODS[name](), METHODS[name]()
    w = method.solution(M, present, cross=M).weights[0]
    assert_near(w[present], alone.weights(M[0][present][:, present]), 1.0, 1e-9)
    assert w[1] == 0
    assert method.task_weights is not None
    assert method.task_weights[0, 1] == 0.25
    later = method.solution(M, None, cross=M).weights
    assert_near(later.sum(-1), torch.ones(1).double(), 1.0, 1e-12)


@each_method
def test_weights_that_waited_come_back_onto_the_simplex(name: str) -> None:
    """After a step without task 1 the kept weights sum to 1.25. The next step starts from their nearest point."""
    A, B = pair(4)
    M = 0.1 * (A @ B.mT).unsqueeze(0)
    present = torch.tensor([True, False, True, True])
    options = {"gamma": 0.01} if name == "modo" else {"lr": 0.01}
    method, started = METHODS[name](**options), METHODS[name](**options)
    method.solution(M, present, cross=M)
    kept = method.state_dict()["task_weights"]
    assert_near(kept.sum(), torch.tensor(1.25), 1.0, 1e-12)
    descending = kept[0].sort(descending=True).values.tolist()
    shift = max((sum(descending[:k]) - 1) / k for k in range(1, 5))
    started.load_state_dict({**started.state_dict(), "task_weights": (kept - shift).clamp(min=0)})
    assert_near(method.weights(M), started.weights(M), 1.0, 1e-12)


@each_method
def test_products_that_are_not_finite_move_nothing(name: str) -> None:
    method, M = METHODS[name](), torch.stack([torch.tensor([[1.0, 0.2], [0.1, 3.0]]).double()] * 2)
    method.weights(M)
    before = copy.deepcopy(method.state_dict())
    w = method.weights(torch.stack([torch.full((2, 2), torch.inf).double(), torch.zeros(2, 2).double()]))
    assert w[0].isnan().all()
    assert w[1].isfinite().all()
    assert torch.equal(method.state_dict()["task_weights"][0], before["task_weights"][0])


def matrices(model: MultiHead, x: Tensor, y: Tensor) -> Tensor:
    """The gradients of the trunk, which all tasks share."""
    params = list(model.trunk.parameters())
    return torch.stack([flat(row, params) for row in task_gradients(model.losses(x, y), params)])


def twin(name: str, first: Tensor, second: Tensor) -> Tensor:
    return getattr(reference, name)([list(first)], [list(second)])[0]


@pytest.mark.parametrize("callables", [False, True])
@each_method
def test_a_step_takes_products_with_the_second_batch_and_no_more_of_it(name: str, callables: bool) -> None:
    model, x, y = problem()
    model.double()
    x, y, other = x.double(), y.double(), x.double().flip(0) + 0.3
    expected = twin(name, matrices(model, x, y), matrices(model, other, y))
    losses: Any = model.losses(x, y)
    second: Any = model.losses(other, y)
    if callables:
        losses, second = ([lambda z=z, i=i: model.losses(z, y)[i] for i in range(3)] for z in (x, other))
    info = gk.backward(losses, model, aggregator=METHODS[name](), second=second)
    trunk = list(model.trunk.parameters())
    assert_near(flat([p.grad for p in trunk], trunk), expected, expected.norm(), 1e-9)
    assert info.gramian is not None
    J = matrices(model, x, y)
    assert_near(info.gramian, J @ J.mT, J.square().sum(), 1e-12)
    for head, loss in zip(model.heads, model.losses(x, y), strict=True):
        for p, g in zip(head.parameters(), torch.autograd.grad(loss, list(head.parameters())), strict=True):
            assert p.grad is not None
            assert_near(p.grad, g, g.norm(), 1e-12)


@pytest.mark.parametrize("fused", [False, True])
@each_method
def test_an_update_does_what_backward_and_step_do(name: str, fused: bool) -> None:
    ends = []
    for at_once in (False, True):
        model, x, y = problem()
        inner = (gk.optim.AdamW if fused else torch.optim.SGD)(model.parameters(), lr=0.01)
        opt = gk.SurgeryOptimizer(inner, METHODS[name](), groups="parameter")
        for k in range(3):
            losses, second = model.losses(x + k, y), model.losses(x.flip(0) - k, y)
            if at_once:
                opt.update(losses, second=second, max_norm=1.0)
            else:
                opt.backward(losses, second=second)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                opt.step()
                opt.zero_grad()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert_near(ends[1], ends[0], ends[0].abs().max(), 1e-4)  # float32; fused clipping is right to a thousandth


def test_embeddings_with_sparse_gradients() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(6, 3, sparse=True).double()
    batches = torch.tensor([[0, 1, 2], [2, 3, 4]])
    targets = torch.randn(2, 3, 3).double()

    def losses(rows: Tensor) -> list[Tensor]:
        return [(table(rows) - target).square().sum() for target in targets]

    first, second = (
        torch.stack([torch.autograd.grad(loss, table.weight)[0].to_dense().flatten() for loss in losses(rows)])
        for rows in batches
    )
    gk.backward(losses(batches[0]), table, aggregator=gk.MoDo(), second=losses(batches[1]))
    assert table.weight.grad is not None
    expected = twin("modo", first, second)
    assert_near(table.weight.grad.to_dense().flatten(), expected, expected.norm(), 1e-9)


def test_second_is_refused_before_anything_changes() -> None:
    model, x, y = problem()
    method = gk.MoDo()
    gk.backward(model.losses(x, y), model, aggregator=method, second=model.losses(x, y))
    state, grads = (
        copy.deepcopy(method.state_dict()),
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
    )
    losses = model.losses(x, y)
    given: list[tuple[Any, gk.Aggregator, str]] = [
        (None, method, r"second must be the losses of another batch, which MoDo\(.*; got None"),
        (model.losses(x, y), gk.MGDA(), r"second must be None: MGDA\(.* does not look at another batch"),
        (model.losses(x, y), gk.Sum(), r"second must be None"),
        (model.losses(x, y)[:2], method, r"second must have 3 entries as losses has, got 2"),
        ([None, *model.losses(x, y)[1:]], method, r"second\[0\] must be a loss, as losses\[0\] is"),
        ([*losses[:2], torch.zeros(())], method, r"second\[2\] reaches no parameter"),
        ([lambda: torch.zeros(())] * 3, method, r"second\[0\] reaches no parameter"),
    ]
    for second, aggregator, message in given:
        with pytest.raises(ValueError, match=message):
            gk.backward(model.losses(x, y), model, aggregator=aggregator, second=second)
        opt = gk.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), aggregator)
        with pytest.raises(ValueError, match=message):
            opt.backward(model.losses(x, y), second=second)
        with pytest.raises(ValueError, match=message):
            opt.update(model.losses(x, y), second=second)
    opt = gk.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), method)
    with (
        pytest.raises(ValueError, match=r"accumulate\(\) has no second batch, .* backward outside of it"),
        opt.accumulate(),
    ):
        pass
    assert torch.equal(method.state_dict()["task_weights"], state["task_weights"])
    assert all(
        p.grad is None if g is None else torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True)
    )


@each_method
def test_a_step_that_raises_puts_the_weights_back(name: str) -> None:
    model, x, y = problem()
    opt = gk.SurgeryOptimizer(gk.optim.AdamW(model.parameters(), lr=0.01), METHODS[name]())
    opt.update(model.losses(x, y), second=model.losses(x + 1, y))
    before = copy.deepcopy(opt.aggregator.state_dict()["task_weights"])
    opt.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        opt.update(model.losses(x, y), second=model.losses(x + 1, y))
    assert torch.equal(opt.aggregator.state_dict()["task_weights"], before)
