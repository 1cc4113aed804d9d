"""Every row of METHODS: it computes what its twin does, obeys its laws, keeps its state, and trains."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import gradkern as gk
from gradkern.aggregators import Entrywise
from gradkern.aggregators.method import Method
from gradkern.aggregators.methods import METHODS
from gradkern.aggregators.projection import Projection
from tests.models import problem
from tests.ops.test_out import assert_equal_states
from tests.problems import conflicting
from tests.tolerances import assert_near

each_method = pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
on_gramians = pytest.mark.parametrize(
    "method", [m for m in METHODS.values() if not m.aggregator.needs_entries], ids=lambda m: m.name
)
"""Other methods' weights need entries of the gradients besides, or they have no weights."""
functions_of_gramians = pytest.mark.parametrize(
    "method",
    [m for m in METHODS.values() if not m.aggregator.needs_entries and m.draws != "weights"],
    ids=lambda m: m.name,
)
"""Random weights are others for each Gramian."""

P = 40
NEAR = 1e-9  # float64; well-conditioned rows


def rows(method: Method, T: int = 4) -> Tensor:
    """Task gradients of which about half of the pairs conflict."""
    torch.manual_seed(0)
    return conflicting(method.tasks or T, P)


def orders(T: int) -> list[list[int]]:
    return [torch.randperm(T, generator=torch.Generator().manual_seed(i)).tolist() for i in range(T)]


def update(
    method: Method, J: Tensor, order: Sequence[Sequence[int]] | None = None, turn: Sequence[int] | None = None
) -> Tensor:
    """The first update of a new aggregator; ``turn``: the order of the losses. A second batch is the first again."""
    given = (
        {"second": J}
        if method.second
        else {name: x if turn is None else x[list(turn)] for name, x in method.beside(J).items()}
    )
    return method.make(orders(len(J)) if order is None else order)(J, **given)


def weights(method: Method, M: Tensor) -> Tensor:
    """The first weights of a new aggregator."""
    return method.make(orders(M.shape[-1])).weights(M, **losses_beside(method, M[(0,) * (M.ndim - 2)]))


def losses_beside(method: Method, M: Tensor) -> dict[str, Tensor]:
    """Return the arguments of the weights beside a Gramian."""
    return {name: x for name, x in method.beside(M).items() if name != "second"}


def assert_same(a: Tensor, b: Tensor) -> None:
    assert_near(a, b, b.norm() + 1e-300, NEAR)


def moved(before: Tensor, after: Tensor) -> bool:
    return bool((before - after).norm() > 1e-3 * before.norm())


@pytest.mark.parametrize("T", [1, 2, 3, 6])
@each_method
def test_as_its_twin(method: Method, T: int) -> None:
    steps = [rows(method, T) + torch.randn(method.tasks or T, P) for _ in range(4)]
    order = orders(len(steps[0]))
    made = method.make(order)
    updates = method.expected([list(J) for J in steps], order)
    for k, (J, expected) in enumerate(zip(steps, updates, strict=False)):
        assert_near(made(J, **method.beside(J, k)), expected, len(J) * J.abs().sum(0), NEAR)


@each_method
def test_a_matrix_may_lie_in_memory_as_it_likes(method: Method) -> None:
    J = rows(method)
    for X in (J.T.contiguous().T, J.repeat_interleave(2, 1)[:, ::2]):
        assert X.stride(1) != 1
        torch.manual_seed(0)
        expected = method.make()(J, **method.beside(J))
        torch.manual_seed(0)
        assert torch.equal(method.make()(X, **method.beside(J)), expected)


NO_MATRICES: list[Callable[[Tensor], Any]] = [
    lambda J: None,
    lambda J: 3,
    lambda J: "J",
    lambda J: J.tolist(),
    lambda J: J.numpy(),
    lambda J: J.int(),
    lambda J: J.bool(),
    lambda J: J.cfloat(),
    lambda J: J.to_sparse(),
    lambda J: J.to_sparse_csr(),
    lambda J: torch.nested.nested_tensor(list(J)),
]


@pytest.mark.filterwarnings("ignore:Sparse CSR|The PyTorch API of nested:UserWarning")
@pytest.mark.parametrize("kind", range(len(NO_MATRICES)))
@each_method
def test_what_is_no_matrix_is_named(method: Method, kind: int) -> None:
    J, made = rows(method), method.make()
    before = copy.deepcopy(made.state_dict())
    with pytest.raises(TypeError, match=r"J must be .*, got "):
        made(NO_MATRICES[kind](J))
    with pytest.raises(TypeError, match=r"M must be .*, got "):
        made.weights(NO_MATRICES[kind](J @ J.mT), *[J] * (method.draws == "entries"))
    if isinstance(made, Projection):
        with pytest.raises(TypeError, match=r"M must be .*, got "):
            made.coefficients(NO_MATRICES[kind](J @ J.mT))
    assert_equal_states(made.state_dict(), before)


@each_method
def test_longer_gradients_make_a_longer_update(method: Method) -> None:
    J, degree = rows(method), method.laws.degree
    if degree is None:
        assert any(moved(update(method, s * J), s * update(method, J)) for s in (1e-3, 1e6))
        return
    for s in (1e-3, 7.0, 1e6):
        if degree is not None:
            assert_same(update(method, s * J), s**degree * update(method, J))


@each_method
def test_what_one_longer_gradient_leaves_as_it_is(method: Method) -> None:
    J = -torch.eye(method.tasks or 3, P).double() + 0.2  # all pairs conflict, all alike
    J[:, 3:] = 0.1 * torch.randn(len(J), P - 3)
    longer = J.clone()
    longer[0] *= 3
    before, after = update(method, J), update(method, longer)
    # The rows are independent, so an update tells its weights.
    w, w_longer = (torch.linalg.lstsq(x.mT, g.unsqueeze(-1)).solution for x, g in ((J, before), (longer, after)))
    kept = {"weights": not moved(w, w_longer), "update": not moved(before, after)}
    assert kept == {"weights": method.laws.invariant == "weights", "update": method.laws.invariant == "update"}


@each_method
def test_tasks_in_another_order(method: Method) -> None:
    J = rows(method)
    order, turn = orders(len(J)), [*range(1, len(J)), 0]
    place = {old: new for new, old in enumerate(turn)}
    turned_order = [[place[j] for j in order[i]] for i in turn]
    before, after = update(method, J, order), update(method, J[turn], turned_order, turn)
    if method.laws.equivariant:
        assert_same(after, before)
    else:
        assert moved(before, after)


@each_method
def test_gradients_without_conflict(method: Method) -> None:
    J = rows(method).abs()
    result = update(method, J)
    for name, expected in (("sum", J.sum(0)), ("mean", J.mean(0))):
        assert moved(expected, result) == (method.laws.no_conflict != name)


@each_method
def test_a_gradient_that_is_zero(method: Method) -> None:
    J = rows(method)
    others = update(method, J[1:], [[0, 1, 2]] * 3) if method.tasks is None else None
    J[0] = 0
    result = update(method, J, [[0, 1, 2, 3]] * 4)
    assert result.isfinite().all()
    if method.laws.zero_row == "ignored":
        assert others is not None
        assert_same(result, others)
    for nothing in (0 * J, J[:1]):
        if method.tasks in (None, len(nothing)):
            assert torch.equal(update(method, nothing), torch.zeros(P, dtype=torch.float64))


@each_method
def test_a_single_task_keeps_its_gradient(method: Method) -> None:
    if method.tasks is None:
        J = rows(method, 1)
        result = update(method, J)
        if method.laws.single == "direction":
            assert moved(J[0], result)
            result = result * (J[0].norm() / result.norm())
        assert_same(result, J[0])


@each_method
def test_a_seed_gives_the_same_updates_again(method: Method) -> None:
    J, updates = rows(method, 6), []
    for _ in range(2):
        torch.manual_seed(1)  # of a network's first parameters
        made = method.seeded(5)
        updates.append([made(J, **method.beside(J))])
        state = torch.get_rng_state()
        updates[-1] += [made(J, **method.beside(J)), made(J, **method.beside(J))]
        assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(*updates, strict=True))


@each_method
def test_its_state_goes_on_where_it_was_saved(method: Method) -> None:
    J = rows(method)
    first, second = method.seeded(5), method.seeded(6)
    trained = {name for name, _ in first.named_parameters() if first.is_trained}
    kept = {key for key in first.state_dict() if not key.endswith("_extra_state")}
    assert bool(kept - trained) <= method.state
    for k in range(3):
        first(J + k, **method.beside(J, k))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for k in range(3):
        given = method.beside(J, k + 3)
        assert torch.equal(first(J - k, **given), second(J - k, **given))


@pytest.mark.parametrize("method", [m for m in METHODS.values() if m.draws != "weights"], ids=lambda m: m.name)
def test_later_updates_depend_on_earlier_ones_with_state_alone(method: Method) -> None:
    J = rows(method)
    made, order = method.make(orders(len(J))), orders(len(J))
    for k in range(101):  # one more than STCH warms up
        made(-J + torch.randn_like(J), **method.beside(J, k))
        if isinstance(made, gk.FAMO):
            made.after(method.beside(J, k + 1)["losses"])
    if method.draws == "weights":
        return  # its generator goes on
    assert torch.equal(made(J, **method.beside(J)), update(method, J, order)) == (not method.state)


@functions_of_gramians
def test_many_gramians_at_once(method: Method) -> None:
    T = method.tasks or 4
    M = torch.stack([gk.gramian(conflicting(T, P)) for _ in range(6)])
    w = weights(method, M.view(2, 3, T, T))
    assert w.shape == (2, 3, T)
    for given, found in zip(M, w.view(6, T), strict=True):
        assert_near(found, weights(method, given), 1.0, NEAR)


@on_gramians
def test_the_dtype_and_the_device_are_those_of_the_gramian(method: Method) -> None:
    M = gk.gramian(rows(method))
    w = weights(method, M)
    single = weights(method, M.float())
    assert single.dtype == torch.float32
    assert_near(single, w, w.abs().max(), 1e-5)
    nowhere = method.make().weights(M.to("meta"), **losses_beside(method, M.to("meta")))
    assert (nowhere.device.type, nowhere.shape, nowhere.dtype) == ("meta", w.shape, w.dtype)


@functions_of_gramians
def test_an_overflow_shows_and_stays_in_its_problem(method: Method) -> None:
    J = rows(method)
    broken = J.clone()
    broken[1, 3] = torch.inf
    M = torch.stack([gk.gramian(broken), gk.gramian(J)])
    w, expected = (weights(method, x) for x in (M, M[1]))
    assert torch.equal(w[1], expected)
    assert not gk.combine(broken, w[0]).isfinite().all()


@pytest.mark.parametrize("groups", ["model", "parameter"])
@each_method
def test_a_step_reads_no_number(method: Method, groups: str) -> None:
    """Fake tensors have none to read."""
    with FakeTensorMode():
        model, x, y = problem(method.tasks or 3)
        opt = gk.SurgeryOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.1), method.make(), groups=groups)
        info = opt.backward(model.losses(x, y), second=model.losses(x, y) if method.second else None)
        opt.step()
        assert info.weights is None or info.weights.shape[-1] == len(y)
        assert (info.weights is None) == issubclass(method.aggregator, Entrywise)


@each_method
def test_a_few_steps_reduce_the_losses(method: Method) -> None:
    model, x, y = problem(method.tasks or 3)
    opt = gk.SurgeryOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.02), method.seeded(0))
    before = torch.stack(model.losses(x, y)).detach()
    for _ in range(30):
        opt.zero_grad()
        info = opt.backward(model.losses(x, y), second=model.losses(x, y) if method.second else None)
        opt.step()
        assert info.weights is None or info.weights.isfinite().all()
    after = torch.stack(model.losses(x, y)).detach()
    assert (after < before).all()
    assert after.sum() < 0.9 * before.sum()


@each_method
def test_its_name_tells_its_arguments(method: Method) -> None:
    made = method.make()
    assert type(made) is method.aggregator is getattr(gk, method.aggregator.__name__)
    assert repr(made) == repr(eval(repr(made), vars(gk).copy()))
