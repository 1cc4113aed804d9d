"""gk.backward: which parameter gets what, against PCGrad on the explicit vectors of torch's own gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradkern as gk
from gradkern import reference
from gradkern.ops.partners import PARTNERS
from tests.models import flat, problem, task_gradients
from tests.tolerances import TOLERANCES, assert_near

ORDER = [[0, 1, 2], [2, 0, 1], [1, 2, 0]]
NEAR = TOLERANCES[torch.float32]

pytestmark = pytest.mark.usefixtures("back_end")


def expected_pcgrad(losses: list[Tensor], params: list[Tensor], order: list[list[int]] = ORDER) -> Tensor:
    """Surgery on ``params`` as one vector per task, by the reference."""
    rows = [flat(grads, params) for grads in task_gradients(losses, params)]
    return sum(reference.pcgrad(rows, order))


def grads_of(params: list[Tensor]) -> Tensor:
    return flat([p.grad for p in params], params)


def test_shared_parameters_get_surgery_and_heads_their_own_gradient(device: torch.device) -> None:
    model, x, y = problem(device=device)
    trunk, heads = list(model.trunk.parameters()), list(model.heads.parameters())
    expected = expected_pcgrad(model.losses(x, y), trunk)
    own = flat(
        [
            sum(g for g in column if g is not None)
            for column in zip(*task_gradients(model.losses(x, y), heads), strict=True)
        ],
        heads,
    )
    for reduction, scale in (("sum", 1.0), ("mean", 1 / 3)):
        model.zero_grad()
        info = gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad(order=ORDER, reduction=reduction))
        assert_near(grads_of(trunk), scale * expected, expected.norm(), NEAR)
        assert torch.equal(grads_of(heads), own)  # unscaled, whatever the reduction
    rows = [flat(grads, trunk) for grads in task_gradients(model.losses(x, y), trunk)]
    M = reference.gramian(rows)
    norms = M.diagonal().sqrt()
    assert bool(info.conflicts.any())
    assert_near(info.gramian.cpu(), M, norms.max() ** 2, NEAR)
    assert_near(info.norms.cpu(), norms, norms.max(), NEAR)
    assert_near(info.cosines.cpu(), M / torch.outer(norms, norms), 1.0, NEAR)
    assert torch.equal(info.conflicts.cpu(), M < 0)
    assert torch.equal(info.losses, torch.stack(model.losses(x, y)).detach())


def test_tensors_callables_and_separate_graphs_agree(device: torch.device) -> None:
    model, x, y = problem(device=device)
    results = []
    for losses in (
        model.losses(x, y),
        [model.loss(t, x, y) for t in range(3)],
        [lambda t=t: model.loss(t, x, y) for t in range(3)],
        [model.loss(0, x, y), lambda: model.loss(1, x, y), model.loss(2, x, y)],
    ):
        model.zero_grad()
        gk.backward(losses, model, aggregator=gk.PCGrad(order=ORDER))
        results.append(grads_of(list(model.parameters())))
    for result in results[1:]:
        assert_near(result, results[0], results[0].norm(), NEAR)


def test_grad_accumulates_in_place_and_is_detached_and_alone() -> None:
    model, x, y = problem()
    gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad(order=ORDER))
    first = [p.grad for p in model.parameters()]
    values = [g.clone() for g in first]
    gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad(order=ORDER))
    for p, g, value in zip(model.parameters(), first, values, strict=True):
        assert p.grad is g
        assert torch.equal(g, value + value)
        assert not g.requires_grad
        assert g.stride() == p.stride()
    storages = [g.untyped_storage().data_ptr() for g in first]
    assert len(set(storages)) == len(storages)


def test_a_parameter_that_no_loss_reaches_keeps_its_grad() -> None:
    model, x, y = problem()
    unused = nn.Parameter(torch.ones(3))
    kept = unused.grad = torch.full((3,), 5.0)
    never = nn.Parameter(torch.ones(3))
    gk.backward(model.losses(x, y), [*model.parameters(), unused, never], aggregator=gk.PCGrad())
    assert unused.grad is kept
    assert torch.equal(kept, torch.full((3,), 5.0))
    assert never.grad is None


def test_a_single_present_task_trains_alone() -> None:
    model, x, y = problem()
    model.loss(1, x, y).backward()
    expected = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    info = gk.backward([None, model.loss(1, x, y), None], model, aggregator=gk.PCGrad(reduction="mean"))
    for p, g in zip(model.parameters(), expected, strict=True):
        assert (p.grad is None) == (g is None)
        assert g is None or torch.equal(p.grad, g)
    assert info.losses.isnan().tolist() == [True, False, True]
    assert torch.equal(info.gramian, torch.zeros(3, 3))


def test_an_absent_task_is_a_zero_row(device: torch.device) -> None:
    model, x, y = problem(device=device)
    trunk = list(model.trunk.parameters())
    losses = model.losses(x, y)
    rows = [flat(grads, trunk) for grads in task_gradients([losses[0], losses[2]], trunk)]
    info = gk.backward([losses[0], None, losses[2]], model, aggregator=gk.PCGrad(order=ORDER))
    expected = sum(reference.pcgrad([rows[0], torch.zeros_like(rows[0]), rows[1]], ORDER))
    assert_near(grads_of(trunk), expected, expected.norm(), NEAR)
    assert info.gramian[1].abs().max() == 0
    assert not info.conflicts[1].any()
    assert all(p.grad is None for p in model.heads[1].parameters())


@pytest.mark.parametrize("absent", [lambda p: None, lambda p: (0 * p).sum()], ids=["absent", "zero"])
@pytest.mark.parametrize("partner", PARTNERS)
def test_an_absent_or_zero_task_is_nobodys_partner(
    partner: str, absent: Callable[[Tensor], Tensor | None], device: torch.device
) -> None:
    p = nn.Parameter(torch.zeros(2, device=device))
    a, b = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], device=device)
    gk.backward([absent(p), a @ p, b @ p], [p], aggregator=gk.PCGrad(partner))
    assert p.grad.tolist() == [0.5, 1.5]  # that of the two tasks alone


def test_shared_names_the_parameters_under_surgery() -> None:
    model, x, y = problem()
    chosen, rest = list(model.trunk[2].parameters()), list(model.trunk[0].parameters())
    expected = expected_pcgrad(model.losses(x, y), chosen)
    plain = torch.stack([flat(g, rest) for g in task_gradients(model.losses(x, y), rest)]).sum(0)
    for shared in (model.trunk[2], chosen, [("a", chosen[0]), ("b", chosen[1])]):
        model.zero_grad()
        gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad(order=ORDER, reduction="mean"), shared=shared)
        assert_near(grads_of(chosen), expected / 3, expected.norm(), NEAR)
        assert_near(grads_of(rest), plain, plain.norm(), NEAR)


def test_a_shared_parameter_may_be_reached_by_one_loss_only() -> None:
    """Rows are zero where their loss does not reach: with a head in the vector, norms and projections change."""
    model, x, y = problem()
    params = [*model.trunk.parameters(), *model.heads[0].parameters()]
    expected = expected_pcgrad(model.losses(x, y), params)
    gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad(order=ORDER), shared=params)
    assert_near(grads_of(params), expected, expected.norm(), NEAR)


@pytest.mark.parametrize("groups", ["parameter", "module", lambda name: name.endswith("bias")])
def test_each_group_is_a_problem_of_its_own(groups: object, device: torch.device) -> None:
    model, x, y = problem(device=device)
    trunk = dict(model.trunk.named_parameters(prefix="trunk"))
    members: dict[object, list[Tensor]] = {}
    for name, p in trunk.items():
        key = name if groups == "parameter" else name.rpartition(".")[0] if groups == "module" else groups(name)
        members.setdefault(key, []).append(p)
    expected = {key: expected_pcgrad(model.losses(x, y), params) for key, params in members.items()}
    info = gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad(order=ORDER), groups=groups)
    for key, params in members.items():
        assert_near(grads_of(params), expected[key], expected[key].norm(), NEAR)
    n_groups = {"parameter": 10, "module": 5}.get(groups, 2) if isinstance(groups, str) else 2
    assert info.gramian.shape == (n_groups, 3, 3)
    assert info.weights.shape == info.norms.shape == (n_groups, 3)


def test_groups_are_numbered_over_all_parameters_reached_or_not() -> None:
    """Freezing the first layer must not move the second layer's number."""
    model, x, y = problem()
    before = gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad(order=ORDER), groups="module")
    model.trunk[0].requires_grad_(False)
    after = gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad(order=ORDER), groups="module")
    assert before.gramian[0].abs().max() > 0
    assert after.gramian[0].abs().max() == 0
    assert torch.equal(after.gramian[1], before.gramian[1])


def test_frozen_parameters_get_nothing() -> None:
    model, x, y = problem()
    model.trunk[0].weight.requires_grad_(False)
    trunk = [p for p in model.trunk.parameters() if p.requires_grad]
    expected = expected_pcgrad(model.losses(x, y), trunk)
    gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad(order=ORDER))
    assert model.trunk[0].weight.grad is None
    assert_near(grads_of(trunk), expected, expected.norm(), NEAR)


def test_tied_parameters_count_once() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"a": shared, "b": shared, "head": nn.Linear(6, 2)})
    x, y = torch.randn(8, 6), 3 * torch.randn(8, 2)

    def losses() -> list[Tensor]:
        out = model["head"](model["b"](model["a"](x).tanh()))
        return [(out[:, t] - y[:, t]).square().mean() for t in range(2)]

    params = list(model.parameters())
    assert len(params) == 4
    order = [[0, 1], [0, 1]]
    expected = expected_pcgrad(losses(), params, order)
    gk.backward(losses(), model, aggregator=gk.PCGrad(order=order))
    assert_near(grads_of(params), expected, expected.norm(), NEAR)


def test_several_dtypes_in_one_model(device: torch.device) -> None:
    """Each dtype's gradients stay in it; their dot products add up."""
    torch.manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    params = [nn.Parameter(torch.randn(50, device=device).to(dtype)) for dtype in dtypes]
    a = [torch.randn(50, dtype=torch.float64).to(dtype).double() for dtype in dtypes]
    b = [-v + 0.5 * torch.randn(50, dtype=torch.float64).to(v.dtype) for v in a]
    b = [v.to(dtype).double() for v, dtype in zip(b, dtypes, strict=True)]

    def loss(c: list[Tensor]) -> Tensor:
        return sum((p.double() * v.to(device)).sum() for p, v in zip(params, c, strict=True))

    info = gk.backward([loss(a), loss(b)], params, aggregator=gk.PCGrad(order=[0, 1]))
    rows = [torch.cat(a), torch.cat(b)]
    assert info.gramian.dtype == torch.float64
    assert_near(info.gramian.cpu(), reference.gramian(rows), rows[0].norm() ** 2, NEAR)
    expected = sum(reference.pcgrad(rows, [[0, 1], [0, 1]])).split(50)
    for p, part in zip(params, expected, strict=True):
        assert p.grad.dtype == p.dtype
        # 10: the weights found in float32 and the rows' values, both up to a few units.
        assert_near(p.grad.cpu(), part, 10.0, max(TOLERANCES[p.dtype], NEAR))


@pytest.mark.parametrize("mixed", [False, True])
def test_sparse_gradients(mixed: bool) -> None:
    """An embedding with sparse gradients gets a sparse one; if a task also uses it densely, a dense one."""
    torch.manual_seed(0)
    embedding = nn.Embedding(20, 4, sparse=True)
    head = nn.Linear(4, 2)
    words = torch.tensor([[1, 5, 5], [7, 1, 0]])
    target = 3 * torch.randn(2, 2)

    def losses() -> list[Tensor]:
        out = head(embedding(words).sum(1))
        first = (out[:, 0] - target[:, 0]).square().mean()
        second = (out[:, 1] - target[:, 1]).square().mean()
        return [first + (embedding.weight.square().sum() if mixed else 0.0), second]

    params = [embedding.weight, *head.parameters()]
    rows = [torch.cat([g.to_dense().reshape(-1).double() for g in grads]) for grads in task_gradients(losses(), params)]
    order = [[0, 1], [0, 1]]
    expected = sum(reference.pcgrad(rows, order))
    for times in (1, 2):
        info = gk.backward(losses(), params, aggregator=gk.PCGrad(order=order))
        assert embedding.weight.grad.is_sparse != mixed
        result = torch.cat([p.grad.to_dense().reshape(-1).double() for p in params])
        assert_near(result, times * expected, times * expected.norm(), NEAR)
    assert_near(info.gramian, reference.gramian(rows), rows[0].norm() * rows[1].norm() + 1, 1e-5)


def test_sparse_then_dense_terms_of_a_sum_of_callables() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    words = torch.tensor([1, 1])
    losses = [lambda: embedding(words).sum(), lambda: embedding.weight.square().sum()]
    for ordered in (losses, losses[::-1]):
        embedding.weight.grad = None
        gk.backward(ordered, embedding, aggregator=gk.Sum())
        expected = 2 * embedding.weight.detach()
        expected[1] += 2
        assert torch.allclose(embedding.weight.grad, expected)


def test_sparse_float64_gradients_have_a_float64_gramian() -> None:
    embedding = nn.Embedding(4, 2, sparse=True, dtype=torch.float64)
    out = embedding(torch.tensor([1, 2]))
    assert gk.backward([out.sum(), out[0].sum()], embedding, aggregator=gk.PCGrad()).gramian.dtype == torch.float64


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
@pytest.mark.parametrize("method", [gk.PCGrad(order=[0, 1]), gk.Sum()])
def test_a_parameter_that_asks_for_another_grad_dtype(method: gk.Aggregator) -> None:
    p = nn.Parameter(torch.randn(3).bfloat16())
    p.grad_dtype = torch.float32
    q = nn.Parameter(torch.randn(3))
    gk.backward([p.float().sum() + q.sum(), 2 * p.float().sum() + q.sum()], [q, p], aggregator=method)
    assert p.grad.dtype == torch.float32
    assert p.grad.tolist() == [3.0, 3.0, 3.0]


def test_non_finite_gradients_reach_grad_and_raise_nothing() -> None:
    """GradScaler looks for them there, and skips the step."""
    for factor in (float("inf"), float("nan")):
        model, x, y = problem()
        losses = model.losses(x, y)
        losses[1] = losses[1] * factor
        info = gk.backward(losses, model, aggregator=gk.PCGrad())
        assert not info.losses[1].isfinite()
        assert any(not p.grad.isfinite().all() for p in model.trunk.parameters())


def test_a_users_own_method_decides_the_weights() -> None:
    class First(gk.Aggregator):
        def weights(self, M: Tensor) -> Tensor:
            w = torch.zeros(M.shape[:-1], dtype=M.dtype)
            w[..., 0] = 2
            return w

    model, x, y = problem()
    trunk = list(model.trunk.parameters())
    expected = 2 * flat(task_gradients(model.losses(x, y), trunk)[0], trunk)
    gk.backward(model.losses(x, y), model, aggregator=First())
    assert_near(grads_of(trunk), expected, expected.norm(), NEAR)


def test_retain_graph() -> None:
    model, x, y = problem()
    losses = model.losses(x, y)
    gk.backward(losses, model, aggregator=gk.PCGrad(order=ORDER), retain_graph=True)
    first = grads_of(list(model.parameters()))
    gk.backward(losses, model, aggregator=gk.PCGrad(order=ORDER))
    assert_near(grads_of(list(model.parameters())), 2 * first, first.norm(), NEAR)
    with pytest.raises(RuntimeError, match="second time"):
        gk.backward(losses, model, aggregator=gk.PCGrad(order=ORDER))


def test_the_same_bits_every_time(device: torch.device) -> None:
    model, x, y = problem(device=device)
    found = []
    for _ in range(3):
        model.zero_grad()
        torch.manual_seed(3)
        gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad(), groups="parameter")
        found.append(grads_of(list(model.parameters())))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_autocast_reaches_the_users_model_but_not_the_surgery() -> None:
    model, x, y = problem()
    trunk = list(model.trunk.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = expected_pcgrad(model.losses(x, y), trunk)
        gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad(order=ORDER))
    assert_near(grads_of(trunk), expected, expected.norm(), NEAR)


def test_no_grad_around_it_changes_nothing() -> None:
    model, x, y = problem()
    losses = [lambda t=t: model.loss(t, x, y) for t in range(3)]
    gk.backward(losses, model, aggregator=gk.PCGrad(order=ORDER))
    expected = grads_of(list(model.parameters()))
    model.zero_grad()
    with torch.no_grad():
        gk.backward(losses, model, aggregator=gk.PCGrad(order=ORDER))
    assert torch.equal(grads_of(list(model.parameters())), expected)


def test_forty_tasks() -> None:
    model, x, y = problem(40)
    trunk = list(model.trunk.parameters())
    order = [torch.randperm(40).tolist() for _ in range(40)]
    expected = expected_pcgrad(model.losses(x, y), trunk, order)
    gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad(order=order))
    # 1e-4: the dot products are float32, and 39 projections in a row magnify their rounding.
    assert_near(grads_of(trunk), expected, expected.norm(), 1e-4)


def test_a_loss_that_is_a_parameter() -> None:
    p = nn.Parameter(torch.tensor(2.0))
    gk.backward([p, -0.5 * p], [p], aggregator=gk.PCGrad(order=[0, 1]))
    assert p.grad == 0.0  # both are projected away: 1 - (-0.5/0.25)(-0.5) = 0
