"""Bad input: an exception that names the argument and the value, before any ``.grad`` has changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradkern as gk
from tests.models import MultiHead, problem

J = torch.randn(3, 10)

OPERATORS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: gk.gramian([[1.0]]), TypeError, r"J must be a tensor, got \[\[?1.0\]\]?"),
    (lambda: gk.gramian(torch.ones(3)), ValueError, r"J must have shape \(T, P\).*got \(3,\)"),
    (lambda: gk.gramian(torch.ones(2, 3, 4)), ValueError, r"J must have shape .*got \(2, 3, 4\)"),
    (lambda: gk.gramian(torch.ones(0, 4)), ValueError, r"J must have shape .*got \(0, 4\)"),
    (lambda: gk.gramian(torch.ones(2, 3, dtype=torch.int64)), TypeError, "J must be float32.*got torch.int64"),
    (lambda: gk.gramian(torch.ones(2, 3, dtype=torch.int64)), TypeError, r"int64: pass J\.float\(\)"),
    (lambda: gk.gramian(torch.ones(2, 3).bool()), TypeError, r"got torch\.bool: pass J\.float\(\)"),
    (lambda: gk.gramian(J.cfloat()), TypeError, r"complex64: pass torch\.view_as_real\(J\)\.flatten\(1\)"),
    (lambda: gk.gramian(J.to_sparse()), TypeError, r"J must be a dense tensor.*sparse_coo: pass J\.to_dense\(\)"),
    (lambda: gk.PCGrad()(J.to_sparse_csr()), TypeError, r"J must be a dense.*sparse_csr: pass J\.to_dense\(\)"),
    (lambda: gk.GradVac()(J.to_sparse()), TypeError, r"J must be a dense tensor.*sparse_coo: pass J\.to_dense\(\)"),
    (lambda: gk.gramian(J, [0, 10]), TypeError, r"offsets must be a tensor, got \[0, 10\]"),
    (lambda: gk.gramian(J, torch.tensor([0, 10], dtype=torch.int32)), TypeError, "offsets .*got torch.int32"),
    (lambda: gk.gramian(J, torch.tensor([0, 10], device="meta")), ValueError, "offsets must be on the CPU.*meta"),
    (lambda: gk.gramian(J, torch.tensor([[0, 10]])), ValueError, r"offsets must have shape .*got \(1, 2\)"),
    (lambda: gk.gramian(J, torch.tensor([0])), ValueError, r"offsets must have shape .*got \(1,\)"),
    (lambda: gk.gramian(J, torch.tensor([0, 7, 5, 10])), ValueError, r"offsets must start at 0.*got \[0, 7, 5, 10\]"),
    (lambda: gk.gramian(J, torch.tensor([0, 9])), ValueError, r"offsets must start .*P = 10, got \[0, 9\]"),
    (lambda: gk.combine(J, torch.ones(3), torch.tensor([0, 10])), ValueError, r"w must have shape \(1, 3\)"),
    (lambda: gk.combine(J, torch.ones(2)), ValueError, r"w must have shape \(3,\) .*got \(2,\)"),
    (lambda: gk.combine(J, [1.0, 1.0, 1.0]), TypeError, r"w must be a tensor, got \[1.0, 1.0, 1.0\]"),
    (lambda: gk.combine(J, torch.ones(3, dtype=torch.int64)), TypeError, "w must be floating, got torch.int64"),
    (lambda: gk.combine(J, torch.ones(3, device="meta")), ValueError, "w must be on J's device, cpu; got meta"),
    (lambda: gk.project(J, torch.ones(3)), ValueError, r"W must have shape \(1, 3\) .*got \(3,\)"),
    (lambda: gk.project(J, torch.ones(0, 3)), ValueError, r"W must have shape \(1, 3\) .*got \(0, 3\)"),
    (lambda: gk.project(J, torch.ones(2, 2)), ValueError, r"W must have shape \(2, 3\) .*got \(2, 2\)"),
    (lambda: gk.PCGrad()(torch.ones(3)), ValueError, "J must have shape"),
    (lambda: gk.Sum()([1.0]), TypeError, r"J must be a tensor, got \[\[?1.0\]\]?"),
]


@pytest.mark.parametrize(("call", "error", "message"), OPERATORS)
def test_operators(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def _grown(model: MultiHead) -> Tensor:
    return model.trunk[0].weight * 2


def _eye(layout: torch.layout) -> Tensor:
    blocks = {"blocksize": (1, 1)} if layout == torch.sparse_bsr else {}
    return torch.eye(3).to_sparse(layout=layout, **blocks).requires_grad_()


def _lazy() -> list[tuple[str, Tensor]]:
    return [(f"lazy.{name}", p) for name, p in nn.LazyLinear(2).named_parameters()]


Case = tuple[Callable[[MultiHead, list[Tensor]], dict[str, Any]], type[Exception], str]

BACKWARD: list[Case] = [
    (lambda m, ls: {"losses": ls[0]}, TypeError, "losses must be a sequence.*got tensor"),
    (lambda m, ls: {"losses": 3}, TypeError, "losses must be a sequence.*got 3"),
    (lambda m, ls: {"losses": set(ls)}, TypeError, r"losses must be a sequence with one entry per task.*got \{"),
    (lambda m, ls: {"losses": dict.fromkeys(ls)}, TypeError, r"losses must be a sequence.*got \{"),
    (lambda m, ls: {"losses": dict.fromkeys(ls).keys()}, TypeError, "losses must be a sequence.*got dict_keys"),
    (lambda m, ls: {"losses": "abc"}, TypeError, "losses must be a sequence.*got .abc"),
    (lambda m, ls: {"losses": b"abc"}, TypeError, "losses must be a sequence.*got b.abc"),
    (lambda m, ls: {"losses": []}, ValueError, "losses is empty"),
    (
        lambda m, ls: {"losses": [ls[0], ls[1].reshape(1).to_sparse()]},
        TypeError,
        r"losses\[1\] must be dense, got layout torch.sparse_coo",
    ),
    (
        lambda m, ls: {"losses": [lambda: ls[0], lambda: ls[1], lambda: ls[2]]},
        ValueError,
        r"losses\[1\] has a graph that an earlier backward pass has freed.*retain_graph=True",
    ),
    (lambda m, ls: {"losses": [lambda: ls[0], lambda: ls[0]]}, ValueError, r"losses\[1\] has a graph that .* freed"),
    (
        lambda m, ls: {"losses": [ls[0], torch.zeros(())]},
        ValueError,
        r"losses\[1\] reaches no parameter.*pass None for a task that is absent",
    ),
    (lambda m, ls: {"losses": [None, None]}, ValueError, "losses has no task present"),
    (lambda m, ls: {"losses": [ls[0], 0.5]}, TypeError, r"losses\[1\] must be a tensor, a callable.*got 0.5"),
    (lambda m, ls: {"losses": [ls[0], lambda: 0.5]}, TypeError, r"losses\[1\] must be a tensor.*got 0.5"),
    (lambda m, ls: {"losses": [ls[0], torch.stack(ls)]}, ValueError, r"losses\[1\] must have one element.*\(3,\)"),
    (lambda m, ls: {"losses": [ls[0], lambda: torch.stack(ls)]}, ValueError, r"losses\[1\] must have one element"),
    (lambda m, ls: {"losses": [ls[0], torch.ones((), dtype=torch.int64)]}, TypeError, r"losses\[1\].*torch.int64"),
    (lambda m, ls: {"losses": [ls[0], torch.ones((), device="meta")]}, ValueError, r"losses\[1\].*cpu; got meta"),
    (lambda m, ls: {"losses": [ls[0], torch.ones(())]}, ValueError, r"losses\[1\] reaches no parameter"),
    (lambda m, ls: {"losses": [ls[0], torch.ones((), requires_grad=True) * 2]}, ValueError, r"\[1\] reaches no param"),
    (lambda m, ls: {"losses": [ls[0], lambda: torch.ones(())]}, ValueError, r"losses\[1\] reaches no parameter"),
    (
        lambda m, ls: {"losses": [ls[0], lambda: torch.ones((), requires_grad=True) * 2]},
        ValueError,
        r"losses\[1\] reaches no parameter",
    ),
    (lambda m, ls: {"params": []}, ValueError, "params is empty"),
    (lambda m, ls: {"params": m.trunk[0].weight}, TypeError, "params must be a Module.*got Parameter"),
    (lambda m, ls: {"params": 3}, TypeError, "params must be a Module.*got int"),
    (lambda m, ls: {"params": [m.trunk[0].weight, 3]}, TypeError, r"params\[1\] must be a tensor.*got int"),
    (lambda m, ls: {"params": [("a", m.trunk[0].weight), m.trunk[0].bias]}, TypeError, r"params mixes.*params\[1\]"),
    (
        lambda m, ls: {"params": [*m.named_parameters(), ("again", m.trunk[0].weight)]},
        ValueError,
        "same tensor twice: 'trunk.0.weight' and 'again'",
    ),
    (
        lambda m, ls: {"params": [*m.parameters(), m.trunk[0].weight]},
        ValueError,
        r"same tensor twice: params\[0\] and params\[10\]",
    ),
    (lambda m, ls: {"params": [_grown(m)]}, ValueError, r"params must be leaf tensors.*params\[0\]"),
    (
        lambda m, ls: {"params": [*m.parameters(), torch.zeros(3, dtype=torch.complex32, requires_grad=True)]},
        TypeError,
        r"params must be float32.* or complex128; params\[10\] is torch.complex32",
    ),
    (
        lambda m, ls: {"params": [*m.parameters(), torch.ones(3, device="meta", requires_grad=True)]},
        ValueError,
        r"params must be on one device; params\[10\] is on meta, others on cpu",
    ),
    *(
        (
            lambda m, ls, layout=layout: {"params": [*m.named_parameters(), ("odd", _eye(layout))]},
            TypeError,
            rf"params must be dense tensors; 'odd' is {layout}",
        )
        for layout in (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr)
    ),
    (
        lambda m, ls: {"params": [*m.parameters(), torch.nested.nested_tensor([J[0], J[1, :2]], requires_grad=True)]},
        TypeError,
        r"params must be dense tensors; params\[10\] is nested",
    ),
    (
        lambda m, ls: {"params": [("a", p) if k else ("b", p) for k, p in enumerate(m.parameters())]},
        ValueError,
        r"params holds the name 'a' twice, params\[1\] and \[2\]",
    ),
    (
        lambda m, ls: {"shared": [("a", p) for p in m.trunk.parameters()]},
        ValueError,
        r"shared holds the name 'a' twice, shared\[0\] and \[1\]",
    ),
    (
        lambda m, ls: {"suppression": gk.Suppression(0.5), "params": [*m.named_parameters(), *_lazy()]},
        ValueError,
        "suppression needs the shapes of all params.*'lazy.weight' has none yet: run its lazy module once",
    ),
    (lambda m, ls: {"params": [torch.ones(3)]}, ValueError, "params holds no tensor that requires grad"),
    (lambda m, ls: {"groups": "layer"}, ValueError, "groups must be 'model', 'parameter', 'module'.*got 'layer'"),
    (lambda m, ls: {"groups": 3}, TypeError, "groups must be a string or a function.*int"),
    (lambda m, ls: {"groups": lambda n: [n]}, TypeError, r"groups must give .*gave \['trunk.0.weight'\]"),
    (lambda m, ls: {"aggregator": GivesNothing()}, TypeError, "aggregator GivesNothing.* gave None"),
    (lambda m, ls: {"groups": "module", "params": list(m.parameters())}, ValueError, "groups='module' needs names"),
    (lambda m, ls: {"groups": lambda n: n, "params": list(m.parameters())}, ValueError, "groups=.* needs names"),
    (lambda m, ls: {"aggregator": "pcgrad"}, TypeError, "aggregator must be a gradkern.Aggregator, got 'pcgrad'"),
    (lambda m, ls: {"aggregator": gk.PCGrad}, TypeError, "aggregator must be a gradkern.Aggregator"),
    (lambda m, ls: {"aggregator": gk.PCGrad(order=[0, 1])}, ValueError, "order is for 2 tasks, M has 3"),
    (lambda m, ls: {"aggregator": gk.Constant([1, 2])}, ValueError, "weights has 2 entries for 3 tasks"),
    (lambda m, ls: {"aggregator": WrongLength()}, ValueError, r"aggregator WrongLength.*weights of shape \(1, 2\)"),
    (lambda m, ls: {"shared": [nn.Parameter(torch.ones(2))]}, ValueError, r"shared must be some of params; shared\[0"),
    (lambda m, ls: {"shared": m.trunk[0].weight}, TypeError, "shared must be a Module.*got Parameter"),
    (lambda m, ls: {"suppression": 0.5}, TypeError, "suppression must be a gradkern.Suppression or None, got 0.5"),
]

OPTIMIZER: list[tuple[dict[str, Any], str]] = [
    ({"suppression": 0.3}, "suppression must be a gradkern.Suppression or None, got 0.3"),
    ({"conflict_lr": "amplify"}, "conflict_lr must be a gradkern.ConflictLR or None, got 'amplify'"),
    ({"memory": 1}, "memory must be True or False, got 1"),
]


@pytest.mark.parametrize(("options", "message"), OPTIMIZER)
def test_what_stands_beside_a_method_is_checked_when_given(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        gk.SurgeryOptimizer(torch.optim.SGD(problem()[0].parameters()), gk.PCGrad(), **options)


class GivesNothing(gk.Aggregator):
    def weights(self, M: Tensor) -> Tensor:
        return None


class WrongLength(gk.Aggregator):
    def weights(self, M: Tensor) -> Tensor:
        return torch.ones(*M.shape[:-2], 2)


@pytest.mark.parametrize("method", [gk.PCGrad(), gk.Sum()], ids=["PCGrad", "Sum"])
@pytest.mark.parametrize(("change", "error", "message"), BACKWARD)
def test_backward_raises_and_changes_nothing(
    change: Callable[[MultiHead, list[Tensor]], dict[str, Any]],
    error: type[Exception],
    message: str,
    method: gk.Aggregator,
) -> None:
    model, x, y = problem()
    losses = model.losses(x, y)
    arguments: dict[str, Any] = {"losses": losses, "params": model, "aggregator": method} | change(model, losses)
    for p in model.parameters():
        p.grad = torch.full_like(p, 4.0)
    with pytest.raises(error, match=message):
        gk.backward(arguments.pop("losses"), arguments.pop("params"), **arguments)
    assert all(torch.equal(p.grad, torch.full_like(p, 4.0)) for p in model.parameters())


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("method", [gk.PCGrad(), gk.GradVac(), gk.Sum()], ids=["PCGrad", "GradVac", "Sum"])
def test_a_loss_whose_graph_is_freed_is_named(method: gk.Aggregator, features: bool) -> None:
    """By an earlier step, as of losses that are kept from step to step; or by a pass of torch's own."""
    model, x, y = problem()
    h = model.trunk(x)
    losses = [(head(h).squeeze(-1) - target).square().mean() for head, target in zip(model.heads, y, strict=True)]
    torch.autograd.grad(losses[1], list(model.heads[1].parameters()))
    named = "one of losses" if isinstance(method, gk.Sum) else r"losses\[1\]"
    with pytest.raises(ValueError, match=rf"^{named} has a graph that an earlier backward pass has freed.*second time"):
        gk.backward(losses, model, aggregator=method, features=h if features else None)
    assert isinstance(method, gk.Sum) or all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", [gk.PCGrad(order=[0, 1]), gk.Sum()], ids=["PCGrad", "Sum"])
def test_callables_may_return_one_graph_that_is_kept(method: gk.Aggregator) -> None:
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    z = p.square()
    losses = [z.sum(), z.prod()]
    gk.backward([lambda: losses[0], lambda: losses[1]], [p], aggregator=method, retain_graph=True)
    assert p.grad.tolist() == [2 + 8, 4 + 4]  # they agree, so PCGrad adds them up too


@pytest.mark.parametrize("method", [gk.PCGrad(order=[0, 1]), gk.Sum()], ids=["PCGrad", "Sum"])
@pytest.mark.parametrize("as_callables", [False, True])
def test_a_lazy_parameter_that_the_step_does_not_use(method: gk.Aggregator, as_callables: bool) -> None:
    """Its module has not run, so it has no shape; a step leaves it alone."""
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    lazy = nn.LazyLinear(2)
    losses = [p.sum(), p.prod()]
    given = [lambda loss=loss: loss for loss in losses] if as_callables else losses
    gk.backward(given, [p, *lazy.parameters()], aggregator=method)
    assert p.grad.tolist() == [1 + 2, 1 + 1]
    assert all(q.grad is None for q in lazy.parameters())


@pytest.mark.parametrize("method", [gk.PCGrad(), gk.Sum()], ids=["PCGrad", "Sum"])
def test_a_grad_that_cannot_be_added_to(method: gk.Aggregator) -> None:
    p, q = (nn.Parameter(torch.ones(4)) for _ in range(2))
    q.grad = torch.ones(1).expand(4)
    with pytest.raises(ValueError, match=r"\.grad of params\[1\] .* in place: strides \(0,\)"):
        gk.backward([(p * q).sum(), p.sum() - q.sum()], [p, q], aggregator=method)
    assert p.grad is None


def test_dtensor_parameters() -> None:
    """A DTensor needs a process group, here one of a single rank, so that nothing else can be what raises."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        p = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Replicate()]))
        with pytest.raises(TypeError, match=r"params must not be DTensors; params\[0\] is one"):
            gk.backward([p.sum(), p.square().sum()], [p], aggregator=gk.PCGrad())
    finally:
        dist.destroy_process_group()
