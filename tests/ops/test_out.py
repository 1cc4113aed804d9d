"""``out=``: results in memory that the caller gives, with the bits of new memory; or an error and nothing changed."""

import copy
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import gradkern as gk
from bench.memory import peak
from gradkern import reference
from gradkern.aggregators.method import Method
from gradkern.aggregators.methods import METHODS
from gradkern.ops import operators
from gradkern.ops.pytorch import combination
from gradkern.ops.pytorch.combination import BAG, FEW
from tests.problems import conflicting
from tests.tolerances import DTYPES, TOLERANCES, assert_near

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
OFFSETS = [0, 5, 5, 40, 60]
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))


def unwritten(J: Tensor) -> Tensor:
    """Return memory for a result, full of NaN, so that unwritten elements show."""
    return J.new_full(J.shape[1:], torch.nan)


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert torch.equal(a.view(BITS[a.element_size()]), b.view(BITS[b.element_size()]))


def matrix(T: int, P: int, dtype: torch.dtype = torch.float32, gap: int = 0) -> Tensor:
    """Return rows that lie ``gap`` numbers apart."""
    return torch.randn(T, P + gap, dtype=torch.float64).to(dtype)[:, :P]


# The result


@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, FEW, FEW + 1, 17])
def test_a_combination_has_the_bits_of_one_in_new_memory(
    T: int, dtype: torch.dtype, gap: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bag of columns, one block of bags, several with a smaller last one, and columns that no bag divides."""
    monkeypatch.setattr(combination, "BAGS", 12 * BAG)
    for P in (0, 1, 1000, 8 * BAG, 12 * BAG, 40 * BAG, 100_003):
        J = matrix(T, P, dtype, gap).to(device)
        weights = torch.randn(T, device=device)
        for w in (weights, weights * (torch.arange(T, device=device) != 1), 0 * weights):
            out = unwritten(J)
            assert gk.combine(J, w, out=out) is out
            assert_same_bits(out, gk.combine(J, w))
        assert_near(out.cpu(), reference.combine(J.cpu(), w.tolist()), torch.ones(P), TOLERANCES[dtype])


@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_segment_is_written(dtype: torch.dtype, gap: int, back_end: str) -> None:
    J, offsets = matrix(5, 9000, dtype, gap), torch.tensor([0, 5, 5, 4096, 9000])
    w = torch.randn(4, 5)
    out = unwritten(J)
    assert gk.combine(J, w, offsets, out=out) is out
    assert_same_bits(out, gk.combine(J, w, offsets))
    blocks = [J[:, a:b] for a, b in ((0, 5), (5, 5), (5, 4096), (4096, 9000))]
    expected = [reference.combine(b, ws.tolist()) for b, ws in zip(blocks, w, strict=True)]
    size = [reference.combine(b.abs(), ws.abs().tolist()) for b, ws in zip(blocks, w, strict=True)]
    assert_near(out, torch.cat(expected), torch.cat(size), TOLERANCES[dtype])


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@each_method
def test_an_update_has_the_bits_of_one_in_new_memory(
    method: Method, dtype: torch.dtype, gap: int, segments: bool, device: torch.device
) -> None:
    """Two updates each: the second one follows from the state after the first."""
    T = method.tasks or 4
    J, offsets = conflicting(T, 60 + gap).to(device, dtype)[:, :60], torch.tensor(OFFSETS) if segments else None
    torch.manual_seed(1)
    given = method.seeded(5, device)
    new = copy.deepcopy(given) if given.generator is None else method.seeded(5, device)
    new.load_state_dict(given.state_dict())
    for _ in range(2):
        out = unwritten(J)
        assert given(J, offsets, **method.beside(J), out=out) is out
        assert_same_bits(out, new(J, offsets, **method.beside(J)))
    assert_equal_states(given.state_dict(), new.state_dict())


def assert_equal_states(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal_states(a[key], b[key])
    else:
        assert a == b


@pytest.mark.parametrize("partner", ["all", "average"])
@pytest.mark.parametrize("gap", [0, 3])
def test_pcgrad_on_each_back_end(gap: int, partner: str, back_end: str, request: pytest.FixtureRequest) -> None:
    J = conflicting(4, 5000 + gap).float()[:, :5000]

    def update(**out: Tensor) -> Tensor:
        torch.manual_seed(1)
        return gk.PCGrad(partner, reduction="mean")(J, **out)

    out = unwritten(J)
    assert update(out=out) is out
    assert_same_bits(out, update())
    torch.manual_seed(1)
    order = torch.rand(1, 4, 4)[0].argsort(-1).tolist()
    expected = torch.stack(reference.pcgrad_of(partner, list(J), order)).mean(0)
    # 10: weights of up to a few units multiply the rounding of the rows.
    assert_near(out, expected, 10 * J.double().abs().max(), TOLERANCES[torch.float32])
    if back_end == "triton":
        assert request.getfixturevalue("triton_serves_the_cpu").count("pcgrad.matrix_out") == 1


def test_a_subclass_has_its_own_weights() -> None:
    class Doubled(gk.PCGrad):
        def weights(self, M: Tensor) -> Tensor:
            return 2 * super().weights(M)

    J = conflicting(3, 50)
    out = Doubled(order=[0, 1, 2])(J, out=unwritten(J))
    expected = 2 * sum(reference.pcgrad(list(J), [[0, 1, 2]] * 3))
    assert_near(out, expected, 10 * J.abs().max(), TOLERANCES[torch.float64])


def test_entries_outside_of_a_sample_are_zero() -> None:
    J, offsets = torch.randn(3, 60), torch.tensor(OFFSETS)
    torch.manual_seed(1)
    given = gk.GradAttention(subset=8, update="subset", generator=torch.Generator().manual_seed(5))
    new = gk.GradAttention(subset=8, update="subset", generator=torch.Generator().manual_seed(5))
    new.load_state_dict(given.state_dict())
    out = unwritten(J)
    assert given(J, offsets, out=out) is out
    assert_same_bits(out, new(J, offsets))
    assert (out != 0).sum() == 5 + 8 + 8  # of segments of 5, 0, 35 and 20 columns


@pytest.mark.parametrize("T", [FEW, FEW + 3])
def test_no_memory_of_the_size_of_a_large_result_is_taken(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(combination, "BAGS", 16 * BAG)
    P = 160 * BAG
    J, out = torch.randn(T, P), torch.empty(P)
    gk.PCGrad()(J, out=out)  # what the processor's bits need is observed once
    assert peak(lambda: gk.PCGrad()(J), "cpu") >= 4 * P
    # A block of bags, its indices and weights: 8 + 4 bytes for each row of 2048 columns, and the Gramian's products.
    assert peak(lambda: gk.PCGrad()(J, out=out), "cpu") <= 4 * 16 * BAG + 1_000_000


@pytest.mark.parametrize("place", ["before", "in the first gap", "in the last gap", "behind"])
def test_memory_beside_the_rows_is_no_part_of_them(place: str) -> None:
    P = 40
    memory = torch.randn(5, 2 * P)
    start = {"before": 1, "in the first gap": 3, "in the last gap": 5, "behind": 8}[place] * P
    J = memory[1:4, :P]
    expected = torch.stack(reference.pcgrad(list(J.clone()), [[0, 1, 2]] * 3)).sum(0)
    out = memory.view(-1)[start : start + P]
    before = J.clone()
    gk.PCGrad(order=[0, 1, 2])(J, out=out)
    assert_near(out, expected, 10 * J.abs().max(), TOLERANCES[torch.float32])
    assert torch.equal(J, before)


# Refusals

Out = Callable[[Tensor], Any]
REFUSED: dict[str, tuple[Out, type[Exception], str]] = {
    "no tensor": (lambda J: np.zeros(60, np.float32), TypeError, "out must be a tensor, got array"),
    "dtype": (lambda J: torch.zeros(60).double(), TypeError, "out must be torch.float32 as J is, got torch.float64"),
    "device": (lambda J: torch.zeros(60, device="meta"), ValueError, "out must be on J's device, cpu; got meta"),
    "length": (
        lambda J: torch.zeros(61),
        ValueError,
        r"out must have shape \(60,\) for J of shape \(\d, 60\), got \(61,\)",
    ),
    "dimensions": (lambda J: torch.zeros(1, 60), ValueError, r"out must have shape \(60,\) .*got \(1, 60\)"),
    "stride": (lambda J: torch.zeros(120)[::2], ValueError, "out must be contiguous, got stride 2"),
    "one number": (lambda J: torch.zeros(1).expand(60), ValueError, "out must be contiguous, got stride 0"),
    "requires grad": (lambda J: torch.zeros(60, requires_grad=True), ValueError, "out must not require grad, got"),
    "a row": (lambda J: J[0], ValueError, "out must share no memory with J and its weights, got the addresses"),
    "the last row": (lambda J: J[-1], ValueError, "out must share no memory with J"),
    "parts of two rows": (lambda J: J.view(-1)[30:90], ValueError, "out must share no memory with J"),
    "the last number": (lambda J: J._base[-61:-1], ValueError, "out must share no memory with J"),
    "the same memory, seen by NumPy": (
        lambda J: torch.from_numpy(J.numpy()[0]),
        ValueError,
        "out must share no memory with J",
    ),
}


def refused(T: int, kind: str) -> tuple[Tensor, Any, type[Exception], str]:
    """Return J, part of a larger memory, what is no ``out`` for it, the error, and its message."""
    J = torch.randn(T * 60 + 60)[: T * 60].view(T, 60)
    make, error, message = REFUSED[kind]
    return J, make(J), error, message


@pytest.mark.parametrize("kind", REFUSED)
def test_a_combination_refuses(kind: str) -> None:
    J, out, error, message = refused(3, kind)
    before = J._base.clone(), copy.deepcopy(out)
    with pytest.raises(error, match=message):
        gk.combine(J, torch.ones(3), out=out)
    assert torch.equal(J._base, before[0])
    assert isinstance(out, np.ndarray) or out.is_meta or torch.equal(out, before[1])


@pytest.mark.parametrize("kind", REFUSED)
@each_method
def test_a_method_refuses_before_its_state_changes(method: Method, kind: str) -> None:
    J, out, error, message = refused(method.tasks or 3, kind)
    torch.manual_seed(1)
    made = method.seeded(5)
    made(torch.randn_like(J), **method.beside(J))
    before, state, drawn = J._base.clone(), copy.deepcopy(made.state_dict()), torch.get_rng_state()
    with pytest.raises(error, match=message):
        made(J, **method.beside(J), out=out)
    assert torch.equal(J._base, before)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert_equal_states(made.state_dict(), state)


def test_the_weights_are_no_place_for_the_result() -> None:
    memory = torch.ones(10)
    with pytest.raises(ValueError, match="out must share no memory with J and its weights"):
        gk.combine(torch.randn(3, 4), memory[:3], out=memory[2:6])
    assert torch.equal(memory, torch.ones(10))


@pytest.mark.parametrize(
    "call",
    [
        lambda J, out: operators.combine_out(J, torch.ones(3), None, out),
        lambda J, out: operators.pcgrad_matrix_out(J, None, "average", False, out),
    ],
    ids=["combine.out", "pcgrad.matrix_out"],
)
def test_the_operators_refuse_rows_too(call: Callable[[Tensor, Tensor], None], back_end: str) -> None:
    """Compiled code calls them with memory that the compiler has chosen."""
    J = torch.randn(3, 60)
    before = J.clone()
    with pytest.raises(ValueError, match="out must share no memory with J"):
        call(J, J[1])
    assert torch.equal(J, before)


def test_an_inference_tensor_takes_results_in_inference_mode_alone() -> None:
    J, w = torch.randn(3, 60), torch.ones(3)
    with torch.inference_mode():
        out = torch.zeros(60)
        gk.combine(J, w, out=out)
        assert torch.equal(out, gk.combine(J, w))
    before = out.clone()
    with pytest.raises(ValueError, match="out must not be an inference tensor outside of inference mode"):
        gk.combine(J, 2 * w, out=out)
    assert torch.equal(out, before)


# Autograd and transforms


@pytest.mark.parametrize("of", ["J", "w"])
def test_no_result_that_autograd_records_goes_to_given_memory(of: str) -> None:
    J, w = torch.randn(3, 60, requires_grad=of == "J"), torch.randn(3, requires_grad=of == "w")
    out = torch.zeros(60)
    with pytest.raises(ValueError, match=r"out must be None where autograd.*got a tensor of shape \(60,\)"):
        gk.combine(J, w, out=out)
    assert torch.equal(out, torch.zeros(60))
    with torch.no_grad():
        assert torch.equal(gk.combine(J, w, out=out), gk.combine(J, w))
    assert not out.requires_grad


@each_method
def test_no_update_that_autograd_records_goes_to_given_memory(method: Method) -> None:
    J = conflicting(method.tasks or 3, 60).requires_grad_()
    out, made = torch.zeros(60, dtype=J.dtype), method.seeded(5)
    state = copy.deepcopy(made.state_dict())
    with pytest.raises(ValueError, match="out must be None where autograd"):
        made(J, **method.beside(J), out=out)
    assert torch.equal(out, torch.zeros_like(out))
    assert_equal_states(made.state_dict(), state)
    with torch.no_grad():
        assert made(J, **method.beside(J), out=out) is out
    assert out.isfinite().all()
    assert not out.requires_grad


@pytest.mark.parametrize("method", [gk.PCGrad(), gk.Sum()])
def test_a_backward_pass_notices_that_what_it_saved_was_overwritten(method: gk.Aggregator, back_end: str) -> None:
    J, out, x = torch.randn(3, 60), torch.ones(60), torch.ones(60, requires_grad=True)
    y = (x * out).sum()
    method(J, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize(
    "transform",
    [lambda f, J: torch.func.grad(lambda J: f(J).sum())(J), lambda f, J: torch.func.vmap(f)(J.unsqueeze(0))],
    ids=["grad", "vmap"],
)
@pytest.mark.parametrize("recorded", [True, False])
def test_transforms_take_no_memory(transform: Callable[..., Any], recorded: bool) -> None:
    J, out = torch.randn(3, 60), torch.zeros(60)
    with torch.set_grad_enabled(recorded), pytest.raises(ValueError, match=r"out must be None where .*torch\.func"):
        transform(lambda J: gk.combine(J, torch.ones(3), out=out), J)
    assert torch.equal(out, torch.zeros(60))


# Without numbers, and compiled


def test_without_numbers() -> None:
    for method in (gk.PCGrad(), gk.GradVac(), gk.Sum()):
        with FakeTensorMode():
            J, out = torch.empty(3, 60), torch.empty(60)
            assert method(J, out=out) is out
        meta = torch.empty(60, device="meta")
        assert method(torch.empty(3, 60, device="meta"), out=meta) is meta


@pytest.mark.parametrize(
    "method", [gk.PCGrad(order=[0, 1, 2]), gk.PCGrad("average"), gk.MGDA(), gk.Mean()], ids=lambda m: type(m).__name__
)
def test_compiled_without_graph_breaks(method: gk.Aggregator, device: torch.device) -> None:
    """MGDA is solved in NumPy on a CPU and by tensors in compiled code, so there its weights differ by roundings."""
    J = conflicting(3, 50).to(device)
    compiled = torch.compile(lambda J, out: method(J, out=out) + 1, fullgraph=True, backend="aot_eager")
    out = unwritten(J)
    result, expected = compiled(J, out), method(J)
    assert torch.equal(result, out + 1)
    assert_near(out, expected, J.abs().sum(0), 1e-12 if isinstance(method, gk.MGDA) else 0.0)


def test_compiled_code_refuses() -> None:
    compiled = torch.compile(lambda J, out: gk.combine(J, torch.ones(3), out=out), backend="aot_eager")
    out = torch.zeros(61)
    with pytest.raises(Exception, match=r"out must have shape \(60,\)"):
        compiled(torch.randn(3, 60), out)
    assert torch.equal(out, torch.zeros(61))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles for the CPU with a C++ compiler")
@pytest.mark.parametrize("start", [180, 60, 30], ids=["behind the rows", "a row", "parts of two rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_for_the_cpu_it_is_right_or_raises(start: int, dtype: torch.dtype) -> None:
    """Inductor may write to the memory of the rows, or to a copy that it copies there later."""
    memory, w = torch.randn(240, dtype=torch.float64).to(dtype), torch.randn(3, dtype=dtype)
    expected = reference.combine(memory[:180].view(3, 60).clone(), w.tolist())

    @torch.compile(fullgraph=True)
    def program(memory: Tensor) -> Tensor:
        return gk.combine(memory[:180].view(3, 60), w, out=memory[start : start + 60])

    before, why = memory.clone(), ""
    try:
        program(memory)
    except ValueError as error:
        why = str(error)
    if why and start < 180:
        assert "out must share no memory" in why
        assert torch.equal(memory, before)
    else:
        # 10: the weights and the numbers are of some units, and there are three of them.
        assert_near(memory[start : start + 60], expected, 10 * torch.ones(60), TOLERANCES[dtype])
