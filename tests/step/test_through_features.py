"""Surgery on the gradients by the features, compared with passes of heads and trunk by torch itself."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import gradkern as gk
from gradkern import reference
from gradkern.aggregators.methods import METHODS as TABLE
from tests.models import MultiHead, problem
from tests.tolerances import assert_near

ORDER = [[0, 1, 2], [2, 0, 1], [1, 2, 0]]
TOLERANCE = 1e-12
"""float64, some hundred terms, and weights from Gramians with condition numbers up to a few hundred."""
METHODS = [
    name
    for name, row in TABLE.items()
    if (made := row.make()).needs_gramian and not (made.needs_entries or made.averages_rows or made.needs_second)
]
each_sum = pytest.mark.parametrize("per_example", [False, True])
THROUGH: dict[str, Any] = {"through": "features"}


@pytest.fixture(autouse=True)
def _float64(float64_by_default: None) -> None:
    pass


def heads_of(model: MultiHead, h: Tensor, y: Tensor) -> list[Tensor]:
    return [(head(h).squeeze(-1) - target).square().mean() for head, target in zip(model.heads, y, strict=True)]


def features_and_losses() -> tuple[MultiHead, Tensor, list[Tensor]]:
    model, x, y = problem()
    h = model.trunk(x)
    return model, h, heads_of(model, h, y)


def by_features(losses: Sequence[Tensor], features: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return H_i for each feature, with zeros where a loss does not reach one."""
    return [
        list(torch.autograd.grad(loss, features, retain_graph=True, allow_unused=True, materialize_grads=True))
        for loss in losses
    ]


def vectors(H: Sequence[Sequence[Tensor]], per_example: bool) -> list[Tensor]:
    """Return what the dot products are of."""
    return [
        torch.cat([(g.double() if per_example or not g.ndim else g.double().sum(0)).reshape(-1) for g in row])
        for row in H
    ]


def seeded(
    features: Sequence[Tensor], H: Sequence[Sequence[Tensor]], w: Tensor, params: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Return the trunk's gradients from one pass, seeded by the weighted sums of H."""
    seeds = [sum(w_i.to(g.dtype) * g for w_i, g in zip(w, column, strict=True)) for column in zip(*H, strict=True)]
    return torch.autograd.grad(features, params, seeds, retain_graph=True)


def assert_gradients(params: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = TOLERANCE) -> None:
    for p, g in zip(params, expected, strict=True):
        assert p.grad is not None
        assert_near(p.grad, g, g.abs().max() + 1e-3, tolerance)


def own_gradients(losses: Sequence[Tensor], model: MultiHead) -> list[Tensor]:
    """Return the gradients of the heads."""
    return list(torch.autograd.grad(sum(losses), list(model.heads.parameters()), retain_graph=True))


@each_sum
@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_the_gramian(name: str, per_example: bool) -> None:
    method = TABLE[name]
    model, h, losses = features_and_losses()
    H = by_features(losses, [h])
    V = vectors(H, per_example)
    numbers = [[loss.item() for loss in losses]]
    (update,) = method.expected([V], ORDER, losses=numbers if method.losses else None)
    w = torch.linalg.lstsq(torch.stack(V).T, update.unsqueeze(1)).solution.squeeze(1)
    expected, own = seeded([h], H, w, list(model.trunk.parameters())), own_gradients(losses, model)
    aggregator = method.make(ORDER)
    info = gk.backward(losses, model, aggregator=aggregator, features=h, **THROUGH, per_example=per_example)
    M = torch.stack(V) @ torch.stack(V).T
    assert_near(info.gramian, M, M.abs().max(), TOLERANCE)
    assert_near(info.weights, w, w.abs().max(), 10 * TOLERANCE)  # least squares lose a digit
    assert_gradients(list(model.trunk.parameters()), expected, 10 * TOLERANCE)
    if not isinstance(aggregator, gk.aggregators.Scalarization):  # these weigh the heads' losses too
        assert_gradients(list(model.heads.parameters()), own)


def test_libmtls_step_with_rep_grad() -> None:
    """As its classes AbsWeighting and HPS compute it: a leaf for each task, whose gradients are summed."""
    model, x, y = problem()
    rep = model.trunk(x)
    rep_tasks = [rep.detach().clone().requires_grad_() for _ in range(3)]
    for t, rep_task in enumerate(rep_tasks):
        heads_of(model, rep_task, y)[t].backward()
    per_grads = torch.stack([rep_task.grad for rep_task in rep_tasks])
    grads = per_grads.reshape(3, rep.size()[0], -1).sum(1)
    weights = torch.linalg.lstsq(grads.T, reference.mgda(list(grads)).unsqueeze(1)).solution.squeeze(1)
    rep.backward(sum(weights[t] * per_grads[t] for t in range(3)))
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    h = model.trunk(x)
    gk.backward(heads_of(model, h, y), model, aggregator=gk.MGDA(), features=h, **THROUGH)
    assert_gradients(list(model.parameters()), expected, 10 * TOLERANCE)  # least squares lose a digit


def test_mgda_ub_is_the_least_vector_in_the_hull_of_all_examples_gradients() -> None:
    """Theorem 1 of Sener and Koltun 2018: where the bound is, no other convex weights give a shorter one."""
    model, h, losses = features_and_losses()
    H = torch.stack(vectors(by_features(losses, [h]), True))
    info = gk.backward(losses, model, aggregator=gk.MGDA(), features=h, **THROUGH, per_example=True)
    w = info.weights
    assert_near(w.sum(), torch.ones(()), 1.0, TOLERANCE)
    least = (w @ H).square().sum()
    assert bool(((H @ (w @ H)) >= least - TOLERANCE * H.square().sum()).all())


def several(scale: float = 1.0) -> tuple[list[nn.Linear], Tensor, list[Tensor], list[Tensor]]:
    """Return three trunks, a head, and losses on features of 2, 3 and 0 dimensions; each is reached by some tasks."""
    torch.manual_seed(0)
    trunks, head = [nn.Linear(4, 5), nn.Linear(4, 6), nn.Linear(4, 1)], nn.Parameter(torch.randn(5))
    x = scale * torch.randn(7, 4)
    f, g, s = trunks[0](x), trunks[1](x).view(7, 2, 3).tanh(), trunks[2](x).mean()
    losses = [
        (f * head).square().mean() + s,
        (g - 1).square().mean() * s,
        (f.mean(1, keepdim=True).unsqueeze(2) * g).sum() - (f + head).square().mean(),
        (head * head).sum(),
    ]
    return trunks, head, [f, g, s], losses


@each_sum
def test_several_features_and_a_task_that_reaches_none(per_example: bool, back_end: str) -> None:
    trunks, head, features, losses = several()
    H = by_features(losses, features)
    V = torch.stack(vectors(H, per_example))
    (own,) = torch.autograd.grad(sum(losses), [head], retain_graph=True)
    below = [p for trunk in trunks for p in trunk.parameters()]
    info = gk.backward(
        losses,
        [*below, head],
        aggregator=gk.PCGrad(order=range(4)),
        features=features,
        **THROUGH,
        per_example=per_example,
        retain_graph=True,
    )
    M = V @ V.T
    assert_near(info.gramian, M, M.abs().max(), TOLERANCE)
    assert info.gramian[3].tolist() == [0.0] * 4
    assert_near(info.weights @ V, reference.pcgrad_update(list(V), [range(4)] * 4), V.norm(), TOLERANCE)
    assert_gradients(below, seeded(features, H, info.weights, below))
    assert_gradients([head], [own])  # of two tasks that use it above the features, and of a third


@each_sum
def test_features_that_reach_nothing_to_train_are_ignored(per_example: bool) -> None:
    trunks, head, (f, g, s), (one, _, other, _) = several()
    losses = [one, other]
    params = [*trunks[0].parameters(), head]
    M = torch.stack(vectors(by_features(losses, [f]), per_example))
    info = gk.backward(
        losses, params, aggregator=gk.MGDA(), features=[g, s, f.detach(), f], **THROUGH, per_example=per_example
    )
    assert_near(info.gramian, M @ M.T, M.square().sum(), TOLERANCE)
    assert all(p.grad is None for trunk in trunks[1:] for p in trunk.parameters())


@pytest.mark.parametrize("features", ["detached", "of another model", "frozen"])
def test_features_that_reach_nothing_at_all_are_refused(features: str) -> None:
    model, x, y = problem()
    params: Any = model.heads if features == "of another model" else model
    if features == "frozen":
        model.trunk.requires_grad_(False)
    h = model.trunk(x)
    h = h.detach() if features == "detached" else h
    called = []
    losses = [lambda t=t: called.append(t) or heads_of(model, h, y)[t] for t in range(3)]
    with pytest.raises(ValueError, match=r"features reach no parameter that is trained: .*not detached; or through="):
        gk.backward(losses, params, aggregator=gk.PCGrad(), features=h, **THROUGH)
    assert not called
    assert all(p.grad is None for p in model.parameters())


def test_the_trunk_and_each_head_get_one_pass_each() -> None:
    model, x, y = problem()
    passes: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., None]:
        return lambda *_: passes.update([name])

    h = model.trunk(x)
    h.grad_fn.register_hook(counted("trunk"))
    losses = heads_of(model, h, y)
    for t, loss in enumerate(losses):
        loss.grad_fn.register_hook(counted(f"head {t}"))
    gk.backward(losses, model, aggregator=gk.PCGrad(), features=h, **THROUGH)
    assert passes == {"trunk": 1, "head 0": 1, "head 1": 1, "head 2": 1}


@each_sum
def test_callables_take_the_step_of_tensors(per_example: bool) -> None:
    results = []
    for as_callables in (False, True):
        model, x, y = problem()
        h = model.trunk(x)
        losses: Any = heads_of(model, h, y)
        if as_callables:
            losses = [lambda t=t: heads_of(model, h, y)[t] for t in range(3)]  # noqa: B023
        gk.backward(losses, model, aggregator=gk.UPGrad(), features=h, **THROUGH, per_example=per_example)
        results.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_callable_that_trains_a_frozen_head_and_one_that_freezes_the_trunk() -> None:
    model, h, losses = features_and_losses()
    y = problem()[2]
    own, H = own_gradients(losses, model), by_features(losses, [h])
    params = list(model.trunk[2].parameters())
    model.heads[1].requires_grad_(False)

    def thawing(t: int) -> Tensor:
        model.heads.requires_grad_(True)
        model.trunk[0].requires_grad_(t < 2)
        return heads_of(model, h, y)[t]

    given = [lambda t=t: thawing(t) for t in range(3)]
    info = gk.backward(given, model, aggregator=gk.MGDA(), features=h, **THROUGH, retain_graph=True)
    assert_gradients(list(model.heads.parameters()), own)
    model.requires_grad_(True)
    assert_gradients(params, seeded([h], H, info.weights, params))
    assert all(p.grad is None for p in model.trunk[0].parameters())


@pytest.mark.parametrize("method", [lambda: gk.PCGrad(order=ORDER), gk.MGDA, gk.RGW, lambda: gk.GradNorm(3)])
def test_an_absent_task_is_a_gradient_of_zero_that_is_left_out(method: Callable[[], gk.Aggregator]) -> None:
    """The step is that of the other two tasks, as far as the method tells an absent task from a gradient of zero."""
    model, h, losses = features_and_losses()
    H = by_features(losses, [h])
    absent = [losses[0], None, losses[2]]
    torch.manual_seed(3)
    info = gk.backward(absent, model, aggregator=method(), features=h, **THROUGH, retain_graph=True)
    assert info.losses.isnan().tolist() == [False, True, False]
    assert info.gramian[1].tolist() == [0.0] * 3
    assert info.weights[1] == 0 or isinstance(method(), gk.PCGrad)
    params = list(model.trunk.parameters())
    zero = [torch.zeros_like(h)]
    assert_gradients(params, seeded([h], [H[0], zero, H[2]], info.weights, params))
    assert all(p.grad is None for p in model.heads[1].parameters())
    plain = copy.deepcopy(info.weights)
    (M,) = [torch.stack(vectors([H[0], zero, H[2]], False))]
    if isinstance(method(), gk.MGDA):
        assert_near(plain[[0, 2]] @ M[[0, 2]], reference.mgda([M[0], M[2]]), M.norm(), TOLERANCE)


@each_sum
def test_a_measured_weighting_weighs_heads_and_trunk(per_example: bool) -> None:
    """Its update is plain training on the weighted sum, and its Gramian costs no further pass of the trunk."""
    model, h, losses = features_and_losses()
    weighted = losses[0] + 2 * losses[1] - 3 * losses[2]
    expected = torch.autograd.grad(weighted, list(model.parameters()), retain_graph=True)
    V = torch.stack(vectors(by_features(losses, [h]), per_example))
    passes: list[int] = []
    h.grad_fn.register_hook(lambda *_: passes.append(1))
    method = gk.Constant([1.0, 2.0, -3.0], report=True)
    info = gk.backward(losses, model, aggregator=method, features=h, **THROUGH, per_example=per_example)
    assert_gradients(list(model.parameters()), expected)
    assert_near(info.gramian, V @ V.T, V.square().sum(), TOLERANCE)
    assert len(passes) == 1


def test_a_weighting_without_a_gramian_goes_on_as_ever() -> None:
    model, h, losses = features_and_losses()
    expected = torch.autograd.grad(sum(losses), list(model.parameters()), retain_graph=True)
    info = gk.backward(losses, model, aggregator=gk.Sum(), features=h, **THROUGH)
    assert info.gramian is None
    assert_gradients(list(model.parameters()), expected)


def test_uncertainty_trains_its_own_parameters() -> None:
    model, h, losses = features_and_losses()
    method = gk.Uncertainty(3, report=True)
    (logs,) = method.parameters()
    params = [*model.parameters(), logs]
    total = sum((-s).exp() * loss / 2 + s / 2 for s, loss in zip(logs, losses, strict=True))
    expected = torch.autograd.grad(total, params, retain_graph=True)
    gk.backward(losses, params, aggregator=method, features=h, **THROUGH)
    assert_gradients(params, expected)


def test_callables_enter_autocast_themselves() -> None:
    model, x, y = problem()
    model, x, y = model.float(), x.float(), y.float()
    h = model.trunk(x)

    def loss(t: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return heads_of(model, h, y)[t]

    H = by_features([loss(t) for t in range(3)], [h])
    V = torch.stack(vectors(H, True))
    info = gk.backward(
        [lambda t=t: loss(t) for t in range(3)], model, aggregator=gk.MGDA(), features=h, **THROUGH, per_example=True
    )
    assert_near(info.gramian, V @ V.T, V.abs() @ V.abs().T, 1e-5)  # sums of 128 products in float32, in any order


def test_hooks_of_parameters_run_once_with_the_whole_gradient() -> None:
    model, h, losses = features_and_losses()
    before: dict[int, Tensor] = {}
    after: Counter[int] = Counter()
    for k, p in enumerate(model.parameters()):
        p.register_hook(lambda g, k=k: before.__setitem__(k, g.clone()))
        p.register_post_accumulate_grad_hook(lambda p, k=k: after.update([k]) or before[k].sub_(p.grad))
    gk.backward(losses, model, aggregator=gk.PCGrad(), features=h, **THROUGH)
    assert after == dict.fromkeys(range(len(before)), 1)
    assert all(difference.abs().max() == 0 for difference in before.values())


def test_it_adds_to_grad() -> None:
    model, h, losses = features_and_losses()
    gk.backward(losses, model, aggregator=gk.MGDA(), features=h, **THROUGH, retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    gk.backward(losses, model, aggregator=gk.MGDA(), features=h, **THROUGH)
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(model.parameters(), once, strict=True))
    with pytest.raises(ValueError, match="has a graph that an earlier backward pass has freed"):
        gk.backward(losses, model, aggregator=gk.MGDA(), features=h, **THROUGH)
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(model.parameters(), once, strict=True))


def test_a_pass_of_the_trunk_that_raises_changes_nothing() -> None:
    model, x, y = problem()
    method = gk.GradVac()
    h = model.trunk(x)
    gk.backward(heads_of(model, h, y), model, aggregator=method, features=h, **THROUGH)
    before, state = [p.grad.clone() for p in model.parameters()], copy.deepcopy(method.state_dict())

    def hook(g: Tensor) -> None:
        raise KeyError("a hook's own")

    model.trunk[0].weight.register_hook(hook)
    h = model.trunk(2 * x)
    with pytest.raises(KeyError, match="a hook's own"):
        gk.backward(heads_of(model, h, y), model, aggregator=method, features=h, **THROUGH)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(x, state[key]) for key, x in method.state_dict().items() if isinstance(x, Tensor))


def test_a_head_and_features_that_autograd_gives_one_tensor() -> None:
    """The seeds must not be written over the gradient of a head."""
    model, x, _ = problem()
    own = [nn.Parameter(torch.randn(16, 8)) for _ in range(3)]
    h = model.trunk(x)
    losses = [(h + p).square().sum() for p in own]
    expected = torch.autograd.grad(sum(losses), own, retain_graph=True)
    gk.backward(losses, [*model.trunk.parameters(), *own], aggregator=gk.MGDA(), features=h, **THROUGH)
    assert_gradients(own, expected)


@each_sum
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_of_short_features_are_in_float32(dtype: torch.dtype, per_example: bool) -> None:
    torch.manual_seed(0)
    trunk, x = nn.Linear(4, 5, dtype=dtype), torch.randn(64, 4).to(dtype)
    h = trunk(x)
    losses = [(h * torch.randn(5).to(dtype)).tanh().float().square().sum() for _ in range(3)]
    H = by_features(losses, [h])
    V = torch.stack(vectors(H, per_example))
    info = gk.backward(
        losses, trunk, aggregator=gk.Constant([1.0, -2.0, 0.5], report=True), features=h, **THROUGH,
        per_example=per_example,
    )  # fmt: skip
    assert info.gramian.dtype == torch.float32
    # Sums of at most 320 terms in float32, in any order; 16 bits would be off by 1e-3.
    assert_near(info.gramian, V @ V.T, V.abs() @ V.abs().T, 2e-5)
    assert trunk.weight.grad.dtype == dtype


LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "an expanded gradient": (lambda h: h, lambda h, q: q * h.sum()),
    "turned features": (lambda h: h.mT, lambda h, q: (q * h.tanh().contiguous()).square().sum()),
    "features with examples last": (lambda h: h.permute(2, 1, 0), lambda h, q: (q + h.mean(0)).square().sum()),
    "channels last": (
        lambda h: h[..., None].to(memory_format=torch.channels_last),
        lambda h, q: (q + h.mean(2)).exp().sum(),
    ),
    "every second number": (lambda h: h[..., ::2], lambda h, q: (q + h.flatten(1)).square().sum()),
}


@each_sum
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_gradient_may_lie_in_memory_in_another_way_than_its_feature(name: str, per_example: bool) -> None:
    turn, loss_of = LAYOUTS[name]
    trunk, heads = nn.Linear(6, 4), [nn.Parameter(torch.randn(())) for _ in range(3)]
    h = turn(trunk(torch.randn(5, 3, 6)))
    losses = [loss_of(h, q) for q in heads]
    H = by_features(losses, [h])
    V = torch.stack(vectors(H, per_example))
    w = gk.UPGrad().weights(V @ V.T)
    expected = seeded([h], H, w, list(trunk.parameters()))
    gk.backward(
        losses, [*trunk.parameters(), *heads], aggregator=gk.UPGrad(), features=h, **THROUGH, per_example=per_example
    )
    assert_gradients(list(trunk.parameters()), expected)


@each_sum
def test_one_feature_of_float64_makes_the_gramian_float64(per_example: bool) -> None:
    torch.manual_seed(0)
    a, b = nn.Linear(4, 5, dtype=torch.float32), nn.Linear(4, 5)
    x = torch.randn(8, 4)
    f, g = a(x.float()), b(x)
    losses = [(f * g).sum(), (f.square() - g).mean()]
    V = torch.stack(vectors(by_features(losses, [f, g]), per_example))
    info = gk.backward(
        losses, [*a.parameters(), *b.parameters()], aggregator=gk.MGDA(), features=[f, g], **THROUGH,
        per_example=per_example,
    )  # fmt: skip
    assert info.gramian.dtype == torch.float64
    assert_near(info.gramian, V @ V.T, V.abs() @ V.abs().T, 1e-5)  # half of the terms are rounded to float32


@each_sum
def test_complex_features(per_example: bool) -> None:
    """Their gradients count as pairs of real numbers, as everywhere."""
    torch.manual_seed(0)
    trunk, x = nn.Linear(4, 5, dtype=torch.complex128), torch.randn(8, 4, dtype=torch.complex128)
    h = trunk(x)
    losses = [(h * torch.randn(5, dtype=torch.complex128)).abs().square().mean() for _ in range(3)]
    H = by_features(losses, [h])
    V = torch.stack([torch.view_as_real(g if per_example else g.sum(0)).reshape(-1) for (g,) in H])
    info = gk.backward(
        losses, trunk, aggregator=gk.MGDA(), features=h, **THROUGH, per_example=per_example, retain_graph=True
    )
    assert_near(info.gramian, V @ V.T, V.square().sum(), TOLERANCE)
    params = list(trunk.parameters())
    for p, g in zip(params, seeded([h], H, info.weights, params), strict=True):
        assert_near(torch.view_as_real(p.grad), torch.view_as_real(g), g.abs().max(), TOLERANCE)


def test_sparse_gradients_of_trunk_and_heads() -> None:
    torch.manual_seed(0)
    ids = torch.randint(9, (6, 2))
    below, above = nn.Embedding(9, 4, sparse=True), nn.Embedding(9, 4, sparse=True)
    h = below(ids).tanh()
    losses = [(h * above(ids)).sum(), (h - 1).square().sum(), (h * above(1 + ids % 8)).square().mean()]
    H = by_features(losses, [h])
    (own,) = torch.autograd.grad(sum(losses), [above.weight], retain_graph=True)
    info = gk.backward(
        losses, [below.weight, above.weight], aggregator=gk.MGDA(), features=h, **THROUGH, retain_graph=True
    )
    (g,) = seeded([h], H, info.weights, [below.weight])
    for p, expected in ((below.weight, g), (above.weight, own)):
        assert p.grad.is_sparse
        assert_near(p.grad.to_dense(), expected.to_dense(), expected.to_dense().abs().max(), TOLERANCE)


def test_features_that_are_computed_from_each_other() -> None:
    """What is computed from the first feature is part of the heads."""
    torch.manual_seed(0)
    stages = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    first = stages[0](torch.randn(6, 4)).tanh()
    second = stages[1](first)
    losses = [first.square().mean(), (second - 1).square().mean(), (first * second).sum()]
    H = by_features(losses, [first])
    own = torch.autograd.grad(sum(losses), list(stages[1].parameters()), retain_graph=True)
    info = gk.backward(
        losses, stages, aggregator=gk.MGDA(), features=[second, first], **THROUGH, per_example=True, retain_graph=True
    )
    V = torch.stack(vectors(H, True))
    assert_near(info.gramian, V @ V.T, V.square().sum(), TOLERANCE)
    params = list(stages[0].parameters())
    assert_gradients(params, seeded([first], H, info.weights, params))
    assert_gradients(list(stages[1].parameters()), own)


def test_a_checkpointed_trunk() -> None:
    model, h, losses = features_and_losses()
    x, y = problem()[1:]
    gk.backward(losses, model, aggregator=gk.MGDA(), features=h, **THROUGH)
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    h = checkpoint(model.trunk, x, use_reentrant=False)
    gk.backward(heads_of(model, h, y), model, aggregator=gk.MGDA(), features=h, **THROUGH)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


def by_hand(model: MultiHead, x: Tensor, y: Tensor) -> None:
    """Write ``.grad`` of PCGrad on the features, with explicit vectors."""
    h = model.trunk(x)
    losses = heads_of(model, h, y)
    H = by_features(losses, [h])
    V = vectors(H, False)
    w = torch.linalg.lstsq(torch.stack(V).T, reference.pcgrad_update(V, ORDER).unsqueeze(1)).solution.squeeze(1)
    params = list(model.trunk.parameters())
    grads = [*seeded([h], H, w, params), *own_gradients(losses, model)]
    for p, g in zip([*params, *model.heads.parameters()], grads, strict=True):
        p.grad = g


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("max_norm", [None, 0.1])
@pytest.mark.parametrize("kind", [torch.optim.SGD, gk.optim.AdamW])
def test_updates(kind: type[torch.optim.Optimizer], max_norm: float | None, scaled: bool) -> None:
    """Three of them: by the optimizer's own way or one for the call, clipped or not, through a scaler or not."""
    model, x, y = problem()
    other = copy.deepcopy(model)
    opt = gk.SurgeryOptimizer(kind(model.parameters(), lr=0.05), gk.PCGrad(order=ORDER), through="features")
    inner = (torch.optim.AdamW if kind is gk.optim.AdamW else kind)(other.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaled else None
    for step in range(3):
        h = model.trunk(x + step)
        losses = [loss if scaler is None else scaler.scale(loss) for loss in heads_of(model, h, y)]
        way: dict[str, Any] = {"through": "features"} if step == 1 else {}
        info = opt.update(losses, features=h, max_norm=max_norm, scaler=scaler, **way)
        if scaler is not None:
            scaler.update()
        by_hand(other, x + step, y)
        if max_norm is not None:
            norm = nn.utils.clip_grad_norm_(other.parameters(), max_norm)
            assert_near(info.total_norm, norm, norm, 1e-9)
        inner.step()
    assert all(p.grad is None for p in model.parameters())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_near(p, q, 1.0, 1e-9)  # three steps, of which AdamW's divide by the gradient's own size


def test_a_step_by_rows_of_an_optimizer_through_features() -> None:
    model, _, losses = features_and_losses()
    opt = gk.SurgeryOptimizer(torch.optim.SGD(model.parameters()), gk.PCGrad(order=ORDER), through="features")
    gk.backward(losses, model, aggregator=gk.PCGrad(order=ORDER), retain_graph=True)
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    opt.backward(losses, through="rows", retain_graph=True)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))
    with pytest.raises(ValueError, match="through='features' needs features=, the output of the trunk"):
        opt.backward(losses)


def test_conflict_lr_works_from_this_gramian() -> None:
    model, h, losses = features_and_losses()
    V = vectors(by_features(losses, [h]), False)
    opt = gk.SurgeryOptimizer(
        torch.optim.SGD(model.parameters()), gk.Sum(), conflict_lr=gk.ConflictLR(), through="features"
    )
    info = opt.backward(losses, features=h)
    expected = torch.tensor(reference.step_scale(V, "attenuate", "mean"))
    assert_near(info.step_scale, expected, 1.0, 1e-12)


def test_warnings() -> None:
    model, h, losses = features_and_losses()
    with pytest.warns(UserWarning, match="no surgery with one task in a step"):
        gk.backward([losses[0], None, None], model, aggregator=gk.PCGrad(), features=h, **THROUGH, retain_graph=True)
    f, g = h.split(4, 1)
    with pytest.warns(UserWarning, match="no surgery in this step, because no parameter"):
        gk.backward([f.sum(), g.sum()], model.trunk, aggregator=gk.PCGrad(), features=[f, g], **THROUGH)


def test_no_number_is_read() -> None:
    """Under a mode in which tensors have none."""
    with FakeTensorMode():
        model, h, losses = features_and_losses()
        info = gk.backward(losses, model, aggregator=gk.MGDA(), features=h, **THROUGH)
    assert info.weights.shape == (3,)
    assert all(p.grad.shape == p.shape for p in model.parameters())


Case = tuple[dict[str, Any], str]
REFUSED: dict[str, Case] = {
    "batched": ({"batched": True}, "batched=True, as the trunk has one pass for all tasks: leave it out"),
    "groups": ({"groups": "parameter"}, "groups='parameter', as the features have one Gramian.*: give through='rows'"),
    "shared": (
        {"shared": True},
        "shared, as surgery is for all parameters below the features.*: leave it out, or give",
    ),
    "suppression": (
        {"suppression": gk.Suppression(0.5, seed=1)},
        "suppression=Suppr.*gradients: give through='rows'",
    ),
    "attention": (
        {"aggregator": gk.GradAttention()},
        "aggregator=GradAttention.* looks at entries .*: give through='rows'",
    ),
    "graddrop": ({"aggregator": gk.GradDrop()}, "aggregator=GradDrop.* looks at entries .*: give through='rows'"),
    "moco": ({"aggregator": gk.MoCo()}, "aggregator=MoCo.* keeps running means of .*: give through='rows'"),
    "modo": (
        {"aggregator": gk.MoDo(), "second": True},
        "aggregator=MoDo.* second batch's gradients: give through='rows'",
    ),
    "memory": ({"memory": True}, "memory=True, which keeps the task gradients: give through='rows'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_come_before_any_pass(case: str) -> None:
    options, message = REFUSED[case]
    model, x, y = problem()
    called: list[int] = []
    h = model.trunk(x)

    def losses() -> Iterator[Callable[[], Tensor]]:
        for t in range(3):
            yield lambda t=t: called.append(t) or heads_of(model, h, y)[t]

    given = {"aggregator": gk.PCGrad(), "features": h, **THROUGH, **options}
    given |= {"shared": list(model.trunk.parameters())} if given.get("shared") else {}
    given |= {"second": list(losses())} if given.get("second") else {}
    made = {name: given.pop(name) for name in ("groups", "shared", "suppression", "memory") if name in given}
    opt = gk.SurgeryOptimizer(torch.optim.SGD(model.named_parameters()), given.pop("aggregator"), **made)
    with pytest.raises(ValueError, match=f"through='features' does not go together with {message}"):
        opt.backward(list(losses()), **given)
    assert not called
    assert all(p.grad is None for p in model.parameters())


def test_what_reaches_the_trunk_past_the_features_is_refused() -> None:
    model, h, losses = features_and_losses()
    losses[1] = losses[1] + model.trunk[0].weight.sum()
    with pytest.raises(ValueError, match=r"losses\[1\] also reaches 1 of the params below features"):
        gk.backward(losses, model, aggregator=gk.PCGrad(), features=h, **THROUGH)
    assert all(p.grad is None for p in model.parameters())
    torch.autograd.grad(losses[0], list(model.heads[0].parameters()))  # no pass has freed its graph


def test_a_loss_that_reaches_nothing_is_refused() -> None:
    model, h, losses = features_and_losses()
    losses[2] = torch.ones(2, requires_grad=True).sum()
    with pytest.raises(ValueError, match=r"losses\[2\] reaches no parameter"):
        gk.backward(losses, model, aggregator=gk.PCGrad(), features=h, **THROUGH)
    assert all(p.grad is None for p in model.parameters())


def test_features_that_are_not_dense_are_refused() -> None:
    w = nn.Parameter(torch.eye(3))
    h = (2 * w).to_sparse()
    losses = [h.to_dense().sum(), h.to_dense().square().sum()]
    with pytest.raises(
        TypeError, match=r"features must be dense tensors with through='features', got torch\.sparse_coo"
    ):
        gk.backward(losses, [w], aggregator=gk.PCGrad(), features=h, **THROUGH)
