"""One pass through a shared trunk: heads go back to the features first, and the trunk once per task or batched."""

from collections.abc import Callable

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

import gradkern as gk
from gradkern import reference
from tests.gradients.test_graphs import Watched, n_alive
from tests.models import MultiHead, flat, problem, task_gradients
from tests.tolerances import assert_near

ORDER = [[0, 1, 2], [2, 0, 1], [1, 2, 0]]
METHODS: dict[str, Callable[[], gk.Aggregator]] = {
    "pcgrad": lambda: gk.PCGrad(order=ORDER),
    "gradvac": lambda: gk.GradVac(0.3, order=ORDER),
    "sum": gk.Sum,
    "constant": lambda: gk.Constant([1.0, 2.0, -3.0]),
}


def heads_of(model: MultiHead, h: Tensor, y: Tensor) -> list[Tensor]:
    return [(head(h).squeeze(-1) - target).square().mean() for head, target in zip(model.heads, y, strict=True)]


def grads_of(params: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in params.parameters()]


def assert_grads(model: nn.Module, expected: list[Tensor | None]) -> None:
    for p, g in zip(model.parameters(), expected, strict=True):
        assert (p.grad is None) == (g is None)
        if g is not None:
            # float64, some hundred terms; batched, matrix products add up in another order.
            assert_near(p.grad, g, g.abs().max() + 1e-3, 1e-12)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("as_callables", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_as_without_features(name: str, as_callables: bool, batched: bool, device: torch.device) -> None:
    model, x, y = problem(device=device)
    model, x, y = model.double(), x.double(), y.double()
    plain = gk.backward(model.losses(x, y), model, aggregator=METHODS[name](), groups="module")
    expected = grads_of(model)
    model.zero_grad()
    h = model.trunk(x)
    losses = heads_of(model, h, y)
    if as_callables:
        losses = [lambda t=t: heads_of(model, h, y)[t] for t in range(3)]
    info = gk.backward(losses, model, aggregator=METHODS[name](), groups="module", features=h, batched=batched)
    assert_grads(model, expected)
    assert torch.equal(info.losses, plain.losses)
    assert_near(info.weights, plain.weights, plain.weights.abs().max(), 1e-9)


@pytest.mark.parametrize("batched", [False, True])
def test_one_pass_through_the_trunk_per_task_or_for_all(batched: bool) -> None:
    model, x, y = problem()
    seen = []

    class Counted(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def setup_context(ctx: object, inputs: object, output: object) -> None:
            pass

        @staticmethod
        def backward(ctx: object, g: Tensor) -> Tensor:
            seen.append(g.shape)
            return g

    h = model.trunk[2](Counted.apply(model.trunk[:2](x)))
    gk.backward(heads_of(model, h, y), model, aggregator=gk.PCGrad(), features=h, batched=batched)
    assert len(seen) == (1 if batched else 3)


@pytest.mark.parametrize("batched", [False, True])
def test_tasks_that_reach_some_features_only(batched: bool) -> None:
    """Two trunks; the first task uses one, the second both, the third the other, a fourth none at all."""
    torch.manual_seed(0)
    a, b = nn.Linear(4, 5).double(), nn.Linear(4, 5).double()
    alone = nn.Parameter(torch.ones(5, dtype=torch.float64))
    params = [*a.parameters(), *b.parameters(), alone]
    x = torch.randn(8, 4, dtype=torch.float64)

    def losses(f: Tensor, g: Tensor) -> list[Tensor]:
        return [f.square().mean(), (f - 2 * g).square().mean(), (-g - 1).square().mean(), (alone * alone).sum()]

    plain = gk.backward(losses(a(x), b(x)), params, aggregator=gk.PCGrad(order=[0, 1, 2, 3]))
    expected = [p.grad.clone() for p in params]
    for p in params:
        p.grad = None
    f, g = a(x), b(x)
    order = [3, 1, 0, 2]  # tasks that reach the same go together, wherever they stand
    put = [losses(f, g)[t] for t in order]
    inverse = [order.index(t) for t in range(4)]
    info = gk.backward(put, params, aggregator=gk.PCGrad(order=inverse), features=[f, g], batched=batched)
    for p, e in zip(params, expected, strict=True):
        assert_near(p.grad, e, e.abs().max(), 1e-12)  # float64
    assert_near(info.gramian[inverse][:, inverse], plain.gramian, plain.gramian.abs().max(), 1e-12)


@pytest.mark.parametrize("batched", [False, True])
def test_one_task_alone_whose_gradients_share_memory(batched: bool) -> None:
    """Autograd gives both terms of a sum one gradient, which is not to be written to twice, nor to be two ``.grad``."""
    a, b = (nn.Parameter(torch.arange(3.0) + k) for k in range(2))
    opt = gk.SurgeryOptimizer(torch.optim.SGD([a, b]), gk.PCGrad())
    with opt.accumulate():
        for _ in range(3):
            h = a + b
            opt.backward([h.sum(), None], features=h, batched=batched)
    assert a.grad.tolist() == b.grad.tolist() == [3.0, 3.0, 3.0]
    a.grad.zero_()
    assert b.grad.tolist() == [3.0, 3.0, 3.0]


@pytest.mark.parametrize("batched", [False, True])
def test_a_hook_that_gives_all_tasks_the_same(batched: bool) -> None:
    a = nn.Parameter(torch.arange(3.0))
    a.register_hook(lambda g: torch.ones(3))
    opt = gk.SurgeryOptimizer(torch.optim.SGD([a]), gk.PCGrad())
    with opt.accumulate():
        for _ in range(3):
            h = 2 * a
            opt.backward([h.sum(), h.square().sum()], features=h, batched=batched)
    assert a.grad.tolist() == [6.0, 6.0, 6.0]  # ones of two tasks, which agree, three times


def test_an_absent_task() -> None:
    model, x, y = problem()
    model, x, y = model.double(), x.double(), y.double()
    losses = model.losses(x, y)
    gk.backward([losses[0], None, losses[2]], model, aggregator=gk.PCGrad(order=ORDER))
    expected = grads_of(model)
    model.zero_grad()
    h = model.trunk(x)
    losses = heads_of(model, h, y)
    gk.backward([losses[0], None, losses[2]], model, aggregator=gk.PCGrad(order=ORDER), features=h, batched=True)
    assert_grads(model, expected)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("as_callables", [False, True])
@pytest.mark.parametrize("below", ["nothing", "frozen", "detached", "of another optimizer", "input"])
@pytest.mark.parametrize("name", ["pcgrad", "sum"])
def test_nothing_to_train_below_features(name: str, below: str, as_callables: bool, batched: bool) -> None:
    """The heads get their own gradients, and nothing else gets any."""
    model, x, y = problem()
    expected = torch.autograd.grad(sum(model.losses(x, y)), list(model.heads.parameters()))
    if below in ("nothing", "frozen", "input"):
        model.trunk.requires_grad_(False)
    x.requires_grad_(below == "input")
    h = model.trunk(x)
    h = h.detach() if below == "detached" else h
    losses = [lambda t=t: heads_of(model, h, y)[t] for t in range(3)] if as_callables else heads_of(model, h, y)
    params = model if below in ("frozen", "detached", "input") else model.heads
    gk.backward(losses, params, aggregator=METHODS[name](), features=h, batched=batched)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.heads.parameters(), expected, strict=True))
    assert all(p.grad is None for p in model.trunk.parameters())
    assert x.grad is None


@pytest.mark.parametrize("batched", [False, True])
def test_one_of_two_trunks_is_trained(batched: bool) -> None:
    torch.manual_seed(0)
    a, b = (nn.Linear(4, 5).double() for _ in range(2))
    x = torch.randn(8, 4, dtype=torch.float64)
    f, g = a(x), b(x)
    losses = [(f * g).mean(), (f - 2 * g).square().mean()]
    rows = [flat(row, list(a.parameters())) for row in task_gradients(losses, list(a.parameters()))]
    gk.backward(losses, a, aggregator=gk.PCGrad(order=[0, 1]), features=[f, g], batched=batched)
    expected = reference.pcgrad_update(rows, [[0, 1], [0, 1]])
    got = flat([p.grad for p in a.parameters()], list(a.parameters()))
    assert_near(got, expected, expected.norm(), 1e-12)  # float64
    assert all(p.grad is None for p in b.parameters())


@pytest.mark.parametrize("trained", ["heads", "trunk"])
def test_a_loss_that_reaches_features_and_nothing_to_train(trained: str) -> None:
    """One whose head belongs to another optimizer; and one that reaches only a trunk that gives it no gradient."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, g: Tensor) -> None:
            return None

    model, x, y = problem()
    h = Nothing.apply(model.trunk(x))
    losses = heads_of(model, h, y)
    params = model.heads[:2] if trained == "heads" else [*model.heads[:2].parameters(), *model.trunk.parameters()]
    with pytest.raises(ValueError, match=r"losses\[2\] reaches no parameter.*pass None for a task that is absent"):
        gk.backward(losses, params, aggregator=gk.PCGrad(), features=h)
    assert all(p.grad is None for p in model.parameters())


PYRAMIDS: dict[str, Callable[[list[Tensor]], object]] = {
    "in order": lambda z: z,
    "backwards": lambda z: z[::-1],
    "the first and the last": lambda z: [z[0], z[2]],
    "a view": lambda z: [z[0], z[0].view_as(z[0])],
}


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("as_callables", [False, True])
@pytest.mark.parametrize("name", PYRAMIDS)
@pytest.mark.parametrize("method", ["pcgrad", "sum"])
def test_features_that_are_computed_from_each_other(method: str, name: str, as_callables: bool, batched: bool) -> None:
    """The outputs of three stages, as of a pyramid; the losses take one or several of them."""
    torch.manual_seed(0)
    stages, heads = (nn.ModuleList(nn.Linear(4, 4).double() for _ in range(3)) for _ in range(2))
    params = [*stages.parameters(), *heads.parameters()]
    x = torch.randn(6, 4, dtype=torch.float64)

    def outputs() -> list[Tensor]:
        z = [x]
        for stage in stages:
            z.append(stage(z[-1]).tanh())
        return z[1:]

    def losses(z: list[Tensor]) -> list[Tensor]:
        out = [head(one) for head, one in zip(heads, z, strict=True)]
        return [out[0].mean() - out[2].square().mean(), out[1].mean() - z[0].mean(), (out[2] + out[0]).sum()]

    rows = task_gradients(losses(outputs()), params)
    shared = [k for k, column in enumerate(zip(*rows, strict=True)) if sum(g is not None for g in column) > 1]
    vectors = [flat([row[k] for k in shared], [params[k] for k in shared]) for row in rows]
    update = reference.pcgrad_update(vectors, ORDER) if method == "pcgrad" else sum(vectors)
    parts = dict(zip(shared, update.split([params[k].numel() for k in shared]), strict=True))
    z = outputs()
    given = [lambda t=t: losses(z)[t] for t in range(3)] if as_callables else losses(z)
    gk.backward(given, params, aggregator=METHODS[method](), features=PYRAMIDS[name](z), batched=batched)
    for k, p in enumerate(params):
        expected = parts[k].view_as(p) if k in parts else sum(row[k] for row in rows if row[k] is not None)
        assert_near(p.grad, expected, expected.abs().max() + 1e-3, 1e-12)  # float64, some hundred terms


def test_a_pyramid_whose_stages_meet_below_features_as_well() -> None:
    """The second stage takes the input's stem too, so the first stage's output is not all that the tasks share."""
    stem, one, two = (nn.Linear(4, 4) for _ in range(3))
    s = stem(torch.randn(5, 4))
    z = one(s)
    losses = [z.sum(), two(z + s).sum()]
    with pytest.raises(
        ValueError, match=r"losses\[1\] also reaches 2 of the params below features by a way past.* leave features out"
    ):
        gk.backward(losses, [*stem.parameters(), *one.parameters()], aggregator=gk.PCGrad(), features=[z, two(z + s)])


def test_the_graph_of_each_head_is_freed_before_the_next_runs() -> None:
    model, x, y = problem()
    Watched.alive = []
    h = model.trunk(x)
    seen = []

    def head(t: int) -> Tensor:
        seen.append(n_alive())
        return Watched.apply((model.heads[t](h).squeeze(-1) - y[t]).square().mean())

    gk.backward([lambda t=t: head(t) for t in range(3)], model, aggregator=gk.PCGrad(), features=h)
    assert seen == [0, 0, 0]


@pytest.mark.parametrize("batched", [False, True])
def test_the_trunks_graph_is_freed_unless_it_is_to_be_kept(batched: bool) -> None:
    model, x, y = problem()
    h = model.trunk(x)
    losses = heads_of(model, h, y)
    for retain_graph in (True, False):
        gk.backward(losses, model, aggregator=gk.PCGrad(), features=h, batched=batched, retain_graph=retain_graph)
    with pytest.raises(ValueError, match="second time"):
        gk.backward(losses, model, aggregator=gk.PCGrad(), features=h, batched=batched)


@pytest.mark.parametrize("batched", [False, True])
def test_optimizers_take_features(batched: bool) -> None:
    """In ``backward``, ``update`` and between micro-batches."""
    results = []
    for with_features in (False, True):
        model, x, y = problem()
        model, x, y = model.double(), x.double(), y.double()
        opt = gk.SurgeryOptimizer(gk.optim.AdamW(model.named_parameters(), lr=0.05), gk.PCGrad(order=ORDER))

        def given(x: Tensor, model: MultiHead = model, on: bool = with_features) -> tuple[list[Tensor], dict]:
            h = model.trunk(x)
            return heads_of(model, h, y), ({"features": h, "batched": batched} if on else {})  # noqa: B023

        for how in ("backward", "update", "accumulate"):
            losses, options = given(x)
            if how == "update":
                opt.update(losses, **options)
                continue
            if how == "backward":
                opt.backward(losses, **options)
            else:
                with opt.accumulate():
                    opt.backward(losses, **options)
                    losses, options = given(2 * x)
                    opt.backward(losses, **options)
            opt.step()
            opt.zero_grad()
        results.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        assert_near(b, a, 1.0, 1e-10)  # float64, through three steps of Adam


def test_checkpointed_trunk() -> None:
    model, x, y = problem()
    model, x, y = model.double(), x.double(), y.double()
    gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad(order=ORDER))
    expected = grads_of(model)
    model.zero_grad()
    h = checkpoint(model.trunk, x, use_reentrant=False)
    gk.backward(heads_of(model, h, y), model, aggregator=gk.PCGrad(order=ORDER), features=h)
    assert_grads(model, expected)
    h = checkpoint(model.trunk, x.requires_grad_(), use_reentrant=True)
    with pytest.raises(ValueError, match=r"features\[0\] runs .*use_reentrant=False"):
        gk.backward(heads_of(model, h, y), model, aggregator=gk.PCGrad(), features=h)


BAD = [
    ({"features": 3}, TypeError, "features must be a tensor or a sequence of tensors, got int"),
    ({"features": []}, ValueError, "features is empty"),
    ({"features": ["h"]}, TypeError, r"features\[0\] must be a tensor, got 'h'"),
    ({"batched": True}, ValueError, "batched=True needs features"),
    ({"features": torch.ones(2), "batched": "x"}, TypeError, "batched must be True or False, got 'x'"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_arguments(options: dict[str, object], error: type[Exception], message: str) -> None:
    model, x, y = problem()
    with pytest.raises(error, match=message):
        gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad(), **options)
    assert all(p.grad is None for p in model.parameters())


def test_features_that_are_not_all_that_the_tasks_share() -> None:
    model, x, y = problem()
    first = model.trunk[:2](x)
    h = model.trunk[2](first)
    losses = heads_of(model, h, y)

    def refused(features: object, message: str, losses: list[Tensor] = losses) -> None:
        with pytest.raises(ValueError, match=message):
            gk.backward(losses, model, aggregator=gk.PCGrad(), features=features, retain_graph=True)
        assert all(p.grad is None for p in model.parameters())

    refused([h, h], r"features\[1\] is given twice")
    skipping = [losses[0], losses[1] + first.sum(), losses[2]]
    refused(h, r"losses\[1\] also reaches 2 of the params below features by a way past", skipping)
    tied = [losses[0], losses[1], losses[2] + model.trunk[2].weight.sum()]
    refused(h, r"losses\[2\] also reaches 1 of the params .*shape \(8, 10\)\. Compute .*leave features out", tied)
    one, other = model.trunk(x).unbind(-1)[:2]  # two outputs of one node: what hangs at the other goes past
    refused(one, r"losses\[1\] also reaches 4 of the params", [one.sum(), other.sum(), one.square().sum()])


@pytest.mark.parametrize("batched", [False, True])
def test_a_hook_on_features_is_refused(batched: bool) -> None:
    """It would run where a head's pass ends and where the trunk's begins, and halve a gradient twice."""
    model, x, y = problem()
    for hook in (lambda h: h.register_hook(lambda g: g / 2), torch.Tensor.retain_grad):
        h = model.trunk(x)
        hook(h)
        with pytest.raises(ValueError, match=r"features\[0\] has a hook or retain_grad\(\)"):
            gk.backward(heads_of(model, h, y), model, aggregator=gk.PCGrad(), features=h, batched=batched)
        assert all(p.grad is None for p in model.parameters())


def test_features_that_have_nothing_to_do_with_it_change_nothing() -> None:
    """Such as of an encoder that is frozen, whose input requires grad."""
    model, x, y = problem()
    gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad(order=ORDER))
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    unrelated = model.trunk(x).detach().requires_grad_()
    gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad(order=ORDER), features=2 * unrelated)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


def test_a_donated_buffer_is_explained() -> None:
    """Autograd's message of a compiled trunk, whose backward pass has overwritten what a second one needs."""

    class Donating(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, g: Tensor) -> Tensor:
            raise RuntimeError("This backward function was compiled with non-empty donated buffers")

    model, x, y = problem()
    h = Donating.apply(model.trunk(x))
    with pytest.raises(ValueError, match=r"losses\[0\] shares a compiled graph .*donated_buffer = False"):
        gk.backward(heads_of(model, h, y), model, aggregator=gk.PCGrad(), features=h)


def compiled_by(read: Callable[[Tensor], object], trunk: nn.Module) -> nn.Module:
    """Return the trunk with a compiled backward pass that reads its gradients' memory, as kernels do."""

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        def run(*args: Tensor) -> object:
            for x in args:
                read(x)
            return graph(*args)

        return make_boxed_func(run)

    torch._dynamo.reset()  # other tests may have compiled nn.Sequential.forward as often as torch allows
    return torch.compile(trunk, backend=aot_autograd(fw_compiler=nop, bw_compiler=compiler))


def nop(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
    return make_boxed_func(graph.forward)


@pytest.mark.parametrize("read", [Tensor.data_ptr, lambda x: memoryview(x.detach().numpy())], ids=["kernel", "numpy"])
def test_a_compiled_trunk_cannot_be_batched(read: Callable[[Tensor], object]) -> None:
    model, x, y = problem()
    h = compiled_by(read, model.trunk)(x)
    losses = heads_of(model, h, y)
    with pytest.raises(ValueError, match=r"features cannot .* all tasks together.* compiled.* pass batched=False"):
        gk.backward(losses, model, aggregator=gk.PCGrad(), features=h, batched=True)
    assert all(p.grad is None for p in model.parameters())
    rows = task_gradients(model.losses(x, y), list(model.trunk.parameters()))
    h = compiled_by(read, model.trunk)(x)
    gk.backward(heads_of(model, h, y), model, aggregator=gk.PCGrad(order=ORDER), features=h)
    expected = reference.pcgrad_update([flat(row, list(model.trunk.parameters())) for row in rows], ORDER)
    got = flat([p.grad for p in model.trunk.parameters()], list(model.trunk.parameters()))
    assert_near(got, expected, expected.norm(), 1e-5)  # float32


def test_an_operation_without_a_rule_for_batches_is_named() -> None:
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, g: Tensor) -> Tensor:
            return g * g.abs().max().item()

    model, x, y = problem()
    h = Reads.apply(model.trunk(x))
    with pytest.raises(ValueError, match=r"features cannot .* pass batched=False \(.*aten::item"):
        gk.backward(heads_of(model, h, y), model, aggregator=gk.PCGrad(), features=h, batched=True)
    assert all(p.grad is None for p in model.parameters())


def test_an_error_of_the_users_own_passes_through() -> None:
    model, x, y = problem()

    def hook(g: Tensor) -> None:
        raise RuntimeError("mine")

    model.trunk[2].weight.register_hook(hook)
    for batched in (False, True):
        h = model.trunk(x)
        with pytest.raises(RuntimeError, match=r"^mine$"):
            gk.backward(heads_of(model, h, y), model, aggregator=gk.PCGrad(), features=h, batched=batched)
