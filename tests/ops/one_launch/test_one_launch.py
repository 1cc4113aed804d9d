"""The whole surgery in one call, by both of its roads: the operators of its steps, and one launch for all.

Everything is compared with the reference on explicit vectors. What is left unwritten is NaN, and so is all that a mask
drops from both passes, and the memory that a launch works in.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from gradkern.ops.schema import arithmetic_dtype
from torch import Tensor
from torch.library import opcheck

import gradkern as gk
from gradkern import reference
from gradkern.aggregators.base import Solution
from gradkern.ops.layout import TILE
from gradkern.ops.one_launch import unfused as composed
from gradkern.ops.partners import ORDERED, PARTNERS
from tests import interpreter
from tests.step.test_no_host_reads import ORDER, RefusesReads, step, update
from tests.tolerances import DTYPES, TOLERANCES, assert_near

pytest.importorskip("triton", reason="no Triton on this platform")
if (reason := interpreter.why_not()) and not torch.cuda.is_available():
    pytest.skip(reason, allow_module_level=True)

from gradkern.kernels import settings, surgery
from gradkern.ops.one_launch import surgery as cuda_surgery
from gradkern.ops.one_launch import work_list as worklist

# NumPy, in the interpreter, which divides what will not be used.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")

# Tensors of one group not next to each other, one on the fast road; a group of nothing but an empty tensor, one of no
# tensors at all; two tensors outside surgery.
NUMELS = [TILE + 9, 7, 0, 301, 60, 130, 0, 7]
SEGMENTS = [1, 0, 0, 1, -1, 0, 2, -1]
N_SEGMENTS = 4
UNITS = [8, -1, 4, (1 << 34) + 4, -1, (1 << 32) - 64, 0, -1]
MASK = (-3, 1 << 40, int(0.45 * (1 << 32)))


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with interpreter.unwritten_is_nan():
        yield


@pytest.fixture
def one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch for everything it can do."""
    sizes = [2, 4, 8]
    monkeypatch.setattr(settings, "ONE_LAUNCH", {(T, size): range(1 << 62) for T in range(1, 5) for size in sizes})


@pytest.fixture(params=["each step", "one launch"])
def road(request: pytest.FixtureRequest) -> Any:
    """The functions of a road, by their names: what composes the operators that there are, or one launch."""
    if request.param == "each step":
        return composed
    request.getfixturevalue("one_launch")
    return cuda_surgery


@dataclass
class Problem:
    """A surgery: the operator's arguments, and the same as the reference takes it.

    Attributes:
        J: (T, P) float64, zeros for missing gradients.
        keep: (P,) bool, of the entries.
    """

    T: int
    dtype: torch.dtype
    numels: list[int] = field(default_factory=lambda: NUMELS)
    segments: list[int] = field(default_factory=lambda: SEGMENTS)
    n_segments: int = N_SEGMENTS
    block: int | None = None
    products: bool = False
    mean: bool = False
    present: list[bool] | None = None
    plain: Tensor | None = None
    missing: bool = True

    def __post_init__(self) -> None:
        J = torch.randn(self.T, sum(self.numels), dtype=F64).to(self.dtype)
        if self.block is None:
            self.keep = torch.ones(J.shape[1], dtype=torch.bool)
        else:
            self.keep = torch.cat(
                [
                    reference.kept(MASK[0] + (1 << 64), MASK[1], MASK[2] / (1 << 32), self.block, unit, numel)
                    if unit >= 0
                    else torch.ones(numel, dtype=torch.bool)
                    for unit, numel in zip(UNITS, self.numels, strict=True)
                ]
            )
        hidden = torch.where(self.keep, J, torch.nan) if self.products else J  # what is never looked at
        self.grads: list[Tensor | None] = [
            part.to(DEVICE, copy=True) for row in hidden for part in row.split(self.numels)
        ]
        self.J = J.double()
        if self.missing and self.T > 1:
            n = len(self.numels)
            for t, k in ((1, 0), (0, n - 1), *((t, 5 % n) for t in range(self.T - 1))):
                self.grads[t * n + k] = None
                self.J[t, sum(self.numels[:k]) : sum(self.numels[: k + 1])] = 0
        self.keys = torch.rand(self.n_segments, self.T, self.T)
        self.out = [torch.full((numel,), torch.nan, dtype=self.dtype, device=DEVICE) for numel in self.numels]

    @property
    def tensors(self) -> tuple[Any, ...]:
        """The first arguments."""
        return self.grads, self.segments, self.n_segments

    @property
    def others(self) -> tuple[Any, ...]:
        """The last ones, after the method's own."""
        present = None if self.present is None else torch.tensor(self.present, device=DEVICE)
        plain = None if self.plain is None else self.plain.to(DEVICE)
        masking = () if self.block is None else (UNITS, self.block, torch.tensor(MASK, device=DEVICE), self.products)
        return self.mean, present, plain, *masking, self.out

    def of_pcgrad(self, partner: str) -> tuple[Any, ...]:
        """All of PCGrad's arguments."""
        keys = self.keys.to(DEVICE) if partner in ORDERED else None
        return *self.tensors, keys, partner, *self.others

    def pcgrad(self, road: Any, partner: str = "all") -> tuple[Tensor, ...]:
        call = road.pcgrad_tensors if self.block is None else road.pcgrad_masked
        return call(*self.of_pcgrad(partner))

    def of_gradvac(self, targets: Tensor, moving: Tensor, beta: float) -> tuple[Any, ...]:
        """All of GradVac's arguments."""
        return *self.tensors, self.keys.to(DEVICE), targets, moving.to(DEVICE), beta, *self.others

    def gradvac(self, road: Any, targets: Tensor, moving: Tensor, beta: float) -> tuple[Tensor, ...]:
        call = road.gradvac_tensors if self.block is None else road.gradvac_masked
        return call(*self.of_gradvac(targets, moving, beta))

    def orders(self, s: int) -> list[list[int]]:
        """In which order each task visits the others."""
        return self.keys[s].argsort(-1).tolist()

    def columns(self, s: int) -> Tensor:
        """Which columns are of a segment."""
        return torch.repeat_interleave(torch.tensor(self.segments) == s, torch.tensor(self.numels))

    def rows(self, s: int) -> list[Tensor]:
        """What the dot products of a segment are of."""
        J = torch.where(self.keep, self.J, 0.0) if self.products else self.J
        return list(J[:, self.columns(s)])

    def check(self, results: tuple[Tensor, ...], method: Callable[[list[Tensor], int], Tensor]) -> None:
        """Hold results against ``method``, which gives (T, T) coefficients of a segment."""
        M, w, *counts = (result.cpu() for result in results)
        wide = arithmetic_dtype(self.dtype)
        assert M.dtype == w.dtype == wide
        assert M.shape == (self.n_segments, self.T, self.T)
        assert w.shape == M.shape[:-1]
        out = torch.cat([o.cpu() for o in self.out])
        present = torch.ones(self.T, dtype=torch.bool) if self.present is None else torch.tensor(self.present)
        for s in range(self.n_segments):
            rows = self.rows(s)
            expected = reference.gramian(rows)
            norms = expected.diagonal().sqrt()
            assert_near(M[s], expected, torch.outer(norms, norms), TOLERANCES[wide])
            C = method(rows, s)
            weights = C[present].sum(0) / (self.T if self.mean else 1)
            # 10: a coefficient is some quotients of dot products, each as far off as these.
            assert_near(w[s], weights, 1 + C.abs().sum(), 10 * TOLERANCES[wide])
            self._check_combined(out, s, w[s].double())
        plain = torch.ones(self.T) if self.plain is None else self.plain
        self._check_combined(out, -1, plain.double())
        assert not out[~self.keep].any()
        if counts:
            masked = torch.repeat_interleave(torch.tensor(UNITS) >= 0, torch.tensor(self.numels))
            assert counts[0].dtype == torch.int64
            assert int(counts[0]) == int((self.keep & masked).sum())

    def _check_combined(self, out: Tensor, s: int, w: Tensor) -> None:
        columns = self.columns(s)
        J = self.J[:, columns]
        expected = torch.where(self.keep[columns], reference.combine(list(J), w.tolist()), 0.0)
        scale = (w[:, None] * J).abs().sum(0) + torch.finfo(self.dtype).smallest_normal
        assert_near(out[columns], expected, scale, TOLERANCES[self.dtype])


def tagged(rows: list[Tensor]) -> list[Tensor]:
    """The rows, each followed by a unit vector so small that no dot product sees it, but :func:`coefficients` does."""
    tags = TINY * torch.eye(len(rows), dtype=F64)
    return [torch.cat((row, tag if row.any() else 0 * tag)) for row, tag in zip(rows, tags, strict=True)]


def coefficients(modified: list[Tensor], rows: list[Tensor]) -> Tensor:
    """(T, T), of which combinations of the tagged rows the modified ones are; one of zeros is left as it is."""
    C = torch.stack([g[-len(rows) :] for g in modified]) / TINY
    return C + torch.diag(torch.tensor([float(not row.any()) for row in rows], dtype=F64))


TINY = 1e-30


def check_pcgrad(given: Problem, road: Any, partner: str = "all") -> tuple[Tensor, ...]:
    results = given.pcgrad(road, partner)

    def method(rows: list[Tensor], s: int) -> Tensor:
        return coefficients(reference.pcgrad_of(partner, tagged(rows), given.orders(s)), rows)

    given.check(results, method)
    return results


def check_gradvac(given: Problem, road: Any, beta: float = 0.25) -> None:
    """A step from random targets, one task of which does not move its own."""
    before = torch.rand(given.n_segments, given.T, given.T, dtype=F64) - 0.5
    moving = torch.tensor([True, False, True, True])[: given.T]
    targets = before.to(DEVICE, copy=True)
    results = given.gradvac(road, targets, moving, beta)
    eps = torch.finfo(arithmetic_dtype(given.dtype)).eps
    tolerance = 10 * TOLERANCES[arithmetic_dtype(given.dtype)]  # as for the weights

    def method(rows: list[Tensor], s: int) -> Tensor:
        modified, moved = reference.gradvac(tagged(rows), given.orders(s), before[s], beta, eps)
        expected = torch.where(moving.unsqueeze(-1), moved, before[s])
        assert_near(targets[s].cpu(), expected, 1.0, tolerance)
        assert torch.equal(targets[s, ~moving].cpu(), before[s, ~moving])
        return coefficients(modified, rows)

    given.check(results, method)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 2, 3, 4])
def test_pcgrad(T: int, dtype: torch.dtype, road: Any) -> None:
    check_pcgrad(Problem(T, dtype), road)


@pytest.mark.parametrize(("T", "dtype"), [(1, F32), (3, BF16), (4, F64)])
def test_gradvac(T: int, dtype: torch.dtype, road: Any) -> None:
    check_gradvac(Problem(T, dtype), road)


@pytest.mark.parametrize("partner", PARTNERS)
def test_the_mean_of_some_tasks_and_weights_outside(partner: str, road: Any) -> None:
    plain = torch.tensor([0.5, 0.0, -2.0])
    check_pcgrad(Problem(3, F32, mean=True, present=[True, False, True], plain=plain), road, partner)


def test_gradvac_with_everything(road: Any) -> None:
    plain = torch.tensor([1.0, 2.0, 3.0])
    check_gradvac(Problem(3, F32, mean=True, present=[False, True, True], plain=plain, block=1), road)


@pytest.mark.parametrize(("T", "dtype"), [(1, F32), (2, F64), (3, BF16), (4, F32)])
@pytest.mark.parametrize("partner", [partner for partner in PARTNERS if partner != "all"])
def test_pcgrad_of_one_partner_or_their_average(partner: str, T: int, dtype: torch.dtype, road: Any) -> None:
    check_pcgrad(Problem(T, dtype), road, partner)


@pytest.mark.parametrize("partner", ["most_similar", "most_different"])
def test_of_partners_of_equal_cosine_the_first(partner: str, road: Any) -> None:
    """Tasks 1, 2 and 3 are of one direction, at lengths of powers of two, so that nothing is rounded."""
    row = torch.randint(-4, 5, (60,), dtype=F64)
    given = Problem(4, F32, [60], [0], 1, missing=False)
    given.grads = [(c * row).float().to(DEVICE) for c in (-1.0, 1.0, 4.0, 0.5)]
    _, w = given.pcgrad(road, partner)
    # Task 0 is projected onto task 1; the others onto task 0, or, most similar to each other, onto nobody.
    expected = [1.0, 2.0, 1.0, 1.0] if partner == "most_similar" else [1 + 1 + 4 + 0.5, 2.0, 1.0, 1.0]
    assert w[0].tolist() == expected


def test_one_order_for_all_segments(road: Any) -> None:
    given = Problem(3, F32)
    given.keys = given.keys[:1].expand(N_SEGMENTS, 3, 3)
    results = given.pcgrad(road)
    given.keys = given.keys[:1]
    assert all(torch.equal(a, b) for a, b in zip(given.pcgrad(road), results, strict=True))


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize(
    ("T", "dtype", "block", "partner"),
    [
        (3, F32, 1, "all"),
        (2, BF16, 1, "random"),
        (4, F64, 128, "average"),
        (3, F32, 128, "most_similar"),
        (4, BF16, 1, "most_different"),
    ],
)
def test_suppression(T: int, dtype: torch.dtype, block: int, partner: str, products: bool, one_launch: None) -> None:
    check_pcgrad(Problem(T, dtype, block=block, products=products), cuda_surgery, partner)


@pytest.mark.parametrize("products", [False, True])
def test_suppression_on_every_road(products: bool, road: Any) -> None:
    given = Problem(3, F32, block=3, products=products)
    check_pcgrad(given, road)
    check_gradvac(given, road)


def test_rows_anywhere_in_memory(road: Any) -> None:
    """Off the boundaries where 128-bit loads are; with the results on them, and off them with the rows on them."""
    for of_rows, of_out in ((1, 0), (0, 1)):
        given = Problem(3, F32)
        given.grads = [None if g is None else shifted(g, of_rows) for g in given.grads]
        given.out = [shifted(o, of_out) for o in given.out]
        check_pcgrad(given, road)


def shifted(t: Tensor, pad: int) -> Tensor:
    buffer = torch.full((pad + len(t),), torch.nan, dtype=t.dtype, device=t.device)
    buffer[pad:] = t
    return buffer[pad:]


def test_a_result_in_the_place_of_a_row(road: Any) -> None:
    given = Problem(3, F32)
    given.out = [next(g for g in given.grads[k :: len(NUMELS)] if g is not None) for k in range(len(NUMELS))]
    check_pcgrad(given, road)


def test_many_small_segments(road: Any) -> None:
    numels = [(7 * k) % 40 for k in range(16)]
    segments = [(k * 12) % 17 - 1 for k in range(16)]
    check_pcgrad(Problem(2, F32, numels, segments, 16, missing=False), road)


def test_no_segment_at_all(road: Any) -> None:
    grads, out = [torch.ones(5, device=DEVICE), torch.ones(5, device=DEVICE)], [torch.zeros(5, device=DEVICE)]
    M, w = road.pcgrad_tensors(grads, [-1], 0, torch.zeros(1, 2, 2, device=DEVICE), "all", False, None, None, out)
    assert M.shape == (0, 2, 2)
    assert w.shape == (0, 2)
    assert torch.equal(out[0].cpu(), torch.full((5,), 2.0))


@pytest.mark.parametrize("name", ["present", "plain"])
def test_what_is_not_of_all_tasks_is_named(name: str, one_launch: None) -> None:
    grads, out = [torch.ones(5, device=DEVICE), torch.ones(5, device=DEVICE)], [torch.zeros(5, device=DEVICE)]
    short = torch.ones(1, dtype=torch.bool if name == "present" else F32, device=DEVICE)
    given = [short if name == "present" else None, short if name == "plain" else None]
    with pytest.raises(ValueError, match=rf"{name} must be of shape \(2,\), got \(1,\)"):
        cuda_surgery.pcgrad_tensors(grads, [0], 1, torch.zeros(1, 2, 2, device=DEVICE), "all", False, *given, out)
    assert torch.equal(out[0].cpu(), torch.zeros(5))


def test_nothing_but_what_is_outside_surgery(road: Any) -> None:
    given = Problem(2, F32, [5, TILE + 3], [-1, -1], 2, missing=False)
    check_pcgrad(given, road)
    check_gradvac(given, road)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_moves_no_target_of_any_segment(value: float, road: Any) -> None:
    given = Problem(3, F32)
    given.grads[0][17] = value  # type: ignore[index]
    before = torch.rand(N_SEGMENTS, 3, 3, dtype=F64)
    targets = before.to(DEVICE, copy=True)
    M, _ = given.gradvac(road, targets, torch.ones(3, dtype=torch.bool), 0.5)
    assert M.isfinite().all(-1).all(-1).tolist() == [True, False, True, True]
    assert torch.equal(targets.cpu(), before)
    assert all(o.isfinite().all() for o, s in zip(given.out, SEGMENTS, strict=True) if s != 1)


@pytest.mark.parametrize("T", [1, 2, 4])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("partner", PARTNERS)
def test_a_matrix(T: int, partner: str, mean: bool, one_launch: None) -> None:
    for P in (0, TILE + 9):
        J, keys = torch.randn(T, P + 3, dtype=F64)[:, :P], torch.rand(1, T, T)
        of_order = keys.to(DEVICE) if partner in ORDERED else None
        out = cuda_surgery.pcgrad_matrix(J.float().to(DEVICE), of_order, partner, mean)
        modified = torch.stack(reference.pcgrad_of(partner, list(J.float()), keys[0].argsort(-1).tolist()))
        # A modified gradient is no longer than the original one: as far off as the sum of all, magnified as above.
        expected = modified.mean(0) if mean else modified.sum(0)
        assert_near(out.cpu(), expected, J.abs().sum(0), 10 * TOLERANCES[F32])


# Which road


@interpreter.interpreted
def test_the_table_says_who_takes_one_launch(triton_serves_the_cpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    P, steps = 14, ["gramian.tensors", "pcgrad", "combine.tensors"]
    for begin, taken in ((P, []), (P + 1, steps)):
        monkeypatch.setattr(settings, "ONE_LAUNCH", {(3, 4): range(begin, 2 * P), (2, 4): range(P)})
        for T, dtype, expected in ((3, F32, taken), (2, F32, steps), (3, F64, steps), (5, F32, steps)):
            triton_serves_the_cpu.clear()
            check_pcgrad(Problem(T, dtype, [5, 9], [0, -1], 1, missing=False), cuda_surgery)
            assert triton_serves_the_cpu == expected


@interpreter.interpreted
def test_a_launch_for_each_step_where_the_table_has_none(
    triton_serves_the_cpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "ONE_LAUNCH", {})
    for block in (None, 1):
        given = Problem(2, F32, block=block, products=True)
        check_pcgrad(given, cuda_surgery)
        check_gradvac(given, cuda_surgery)
    passes = [f"{step}_{form}" for form in ("tensors", "masked") for step in ("gramian", "combine")]
    assert [name for name in triton_serves_the_cpu if "_" in name] == [*2 * passes[:2], *2 * passes[2:]]
    assert [name for name in triton_serves_the_cpu if "_" not in name] == 2 * ["pcgrad", "gradvac"]


@interpreter.interpreted
def test_amd_takes_a_launch_for_each_step(
    triton_serves_the_cpu: list[str], one_launch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.0")
    check_pcgrad(Problem(3, F32, [5, 9], [0, -1], 1, missing=False), cuda_surgery)
    assert triton_serves_the_cpu == ["gramian.tensors", "pcgrad", "combine.tensors"]


def test_bad_arguments_are_named_before_anything_changes(one_launch: None) -> None:
    given = Problem(3, F32)
    keys = given.keys
    targets, moving = torch.zeros(N_SEGMENTS, 3, 3, dtype=F64, device=DEVICE), torch.ones(3, dtype=torch.bool)
    given.keys = keys[:2]
    with pytest.raises(ValueError, match=r"keys must be \(4, 3, 3\) or \(1, 3, 3\), got \(2, 3, 3\)"):
        given.pcgrad(cuda_surgery)
    given.keys = keys
    for of_order, partner in ((None, "all"), (keys, "average")):
        with pytest.raises(ValueError, match=f"keys must be .* with partner='{partner}'"):
            cuda_surgery.pcgrad_tensors(*given.tensors, of_order, partner, *given.others)
    for bad in (targets.float(), targets.mT):
        with pytest.raises(ValueError, match="targets must be contiguous float64"):
            given.gradvac(cuda_surgery, bad, moving, 0.1)
    given.block = 0
    with pytest.raises(ValueError, match="block must be from 1 to 1073741824, got 0"):
        given.pcgrad(cuda_surgery)
    assert all(o.isnan().all() for o in given.out)


def test_nothing_is_read_on_the_host(one_launch: None) -> None:
    given = Problem(2, F32, block=128, present=[True, False], plain=torch.tensor([1.0, 2.0]))
    for partner in ("random", "most_similar"):
        arguments = given.of_pcgrad(partner)
        with RefusesReads():
            cuda_surgery.pcgrad_masked(*arguments)


def test_operators_keep_torchs_contract() -> None:
    ops = torch.ops.gradkern
    targets, moving = torch.zeros(N_SEGMENTS, 3, 3, dtype=F64, device=DEVICE), torch.ones(3, device=DEVICE).bool()
    for block in (None, 1):
        given = Problem(3, F32, block=block, present=[True, True, False])
        overload = "tensors" if block is None else "masked"
        for partner in ("all", "average"):
            opcheck(getattr(ops.pcgrad, overload), given.of_pcgrad(partner))
        opcheck(getattr(ops.gradvac, overload), given.of_gradvac(targets, moving, 0.1))


# Programs that share the work


def everything(given: Problem) -> list[Tensor]:
    """All that a step of GradVac writes, into memory of its own."""
    targets = torch.full((given.n_segments, given.T, given.T), 0.25, dtype=F64, device=DEVICE)
    given.out = [torch.full_like(o, torch.nan).share_memory_() for o in given.out]
    results = given.gradvac(cuda_surgery, targets, torch.ones(given.T, dtype=torch.bool), 0.1)
    return [*results, targets, *(o.clone() for o in given.out)]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_more_programs_than_work_give_the_same_bits(one_launch: None, monkeypatch: pytest.MonkeyPatch) -> None:
    given = Problem(3, F32, block=128)
    expected = everything(given)
    monkeypatch.setattr(cuda_surgery, "_programs", lambda device, n_items: n_items + 20)
    assert_same(everything(given), expected)


@pytest.fixture
def groups_of_two(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Partial sums are added up by twos."""
    for module in (worklist, surgery):
        monkeypatch.setattr(module, "FOLD", 2)
    worklist.work_list.cache_clear()
    yield
    worklist.work_list.cache_clear()


@interpreter.interpreted
def test_programs_that_run_at_once_give_the_same_bits(
    one_launch: None, groups_of_two: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work for three, in an order in which they wait for each other: combinations close behind their dot products."""
    monkeypatch.setattr(worklist, "LAG", {4: 1})
    monkeypatch.setattr(cuda_surgery, "_of_stream", {})
    numels = [300, 5, 2 * TILE + 7, 40, 1, 700, 33]
    given = Problem(2, F32, numels, [0, 1, 2, 3, 4, 5, -1], 7, missing=False)
    expected = everything(given)
    with interpreter.programs_at_once(3):
        for _ in range(5):
            assert_same(everything(given), expected)
            assert not any(shared.any() for shared in cuda_surgery._of_stream.values())


def test_partial_sums_of_many_groups(one_launch: None, groups_of_two: None) -> None:
    """More groups than are added up at a time, and one that is not full."""
    check_pcgrad(Problem(2, F64, [4 * TILE + 5, 3], [1, 0], 2, missing=False), cuda_surgery)


def test_counters_are_zero_again_for_whoever_comes_next(one_launch: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_surgery, "_of_stream", {})
    few = Problem(3, F32, [5, 9], [0, -1], 1, missing=False)
    many = Problem(3, F32, [5] * 12, [*range(12)], 12, missing=False)
    expected = everything(few)
    for given in (few, many, few):
        check_gradvac(given, cuda_surgery)
        (shared,) = cuda_surgery._of_stream.values()
        assert not shared.any()
    assert_same(everything(few), expected)


def test_again_and_again_the_same_bits(one_launch: None) -> None:
    """A thousand times where programs run at once; the interpreter takes 50 ms for what is always the same order."""
    if DEVICE.type == "cpu":
        given, times = Problem(2, F32, [40, 9], [0, 1], 2, missing=False), 10
    else:
        numels, segments = [700_000, 40 * TILE, *[300] * 60, 90_000], [*range(62), -1]
        given, times = Problem(3, F32, numels, segments, 62, missing=False), 1000
    expected = everything(given)
    for _ in range(times):
        assert_same(everything(given), expected)


def launched(given: Problem) -> Callable[[], list[Tensor]]:
    """A launch of PCGrad whose arguments are on the device already, so that the host waits for nothing."""
    arguments = given.of_pcgrad("all")

    def run() -> list[Tensor]:
        return [*cuda_surgery.pcgrad_tensors(*arguments), *given.out]

    return run


@needs_gpu
@pytest.mark.parametrize("replayed", [False, True])
def test_two_streams_at_once(one_launch: None, replayed: bool) -> None:
    """Each has counters of its own, and so has a captured launch; both hold the device at the same time."""
    runs = [launched(Problem(3, F32, [1_000_000, 5000, 90_000], [0, 1, -1], 2, missing=False)) for _ in range(2)]
    expected = [[tensor.clone() for tensor in run()] for run in runs]
    torch.cuda.synchronize()
    if replayed:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            of_graph = runs[0]()

        def replay() -> list[Tensor]:
            graph.replay()
            return of_graph

        runs[0] = replay
    streams = [torch.cuda.Stream() for _ in runs]
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # cycles: some 0.1 s, in which the host queues all of the following
    wrong = [torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in runs]
    for _ in range(200):
        for n, (run, stream) in enumerate(zip(runs, streams, strict=True)):
            with torch.cuda.stream(stream):
                found = run()
                wrong[n] += sum((a != b).sum() for a, b in zip(found, expected[n], strict=True))
    torch.cuda.synchronize()
    assert [int(n) for n in wrong] == [0, 0]


# The step


STEPS: dict[str, tuple[Callable[[], gk.Aggregator], str, Callable[[], dict[str, Any]], str]] = {
    "pcgrad": (lambda: gk.PCGrad(order=ORDER), "model", dict, "surgery"),
    "mean over groups": (lambda: gk.PCGrad("random", ORDER, "mean"), "module", dict, "surgery"),
    "average over groups": (lambda: gk.PCGrad("average"), "parameter", dict, "surgery"),
    "most similar": (
        lambda: gk.PCGrad("most_similar"),
        "model",
        lambda: {"suppression": suppression("all")},
        "pcgrad_masked",
    ),
    "most different": (lambda: gk.PCGrad("most_different"), "module", lambda: {"memory": True}, "surgery"),
    "gradvac": (lambda: gk.GradVac(0.5, ORDER), "parameter", dict, "surgery"),
    "update": (
        lambda: gk.PCGrad(order=ORDER),
        "model",
        lambda: {"suppression": suppression("update")},
        "pcgrad_masked",
    ),
    "all": (lambda: gk.GradVac(0.5, ORDER), "model", lambda: {"suppression": suppression("all")}, "gradvac_masked"),
    "kappa": (lambda: gk.PCGrad(order=ORDER), "model", lambda: {"conflict_lr": gk.ConflictLR()}, "surgery"),
    "memory": (lambda: gk.GradVac(0.5, ORDER), "model", lambda: {"memory": True}, "surgery"),
}


def suppression(scope: str) -> gk.Suppression:
    return gk.Suppression(0.4, 2, scope, seed=1)


@interpreter.interpreted
@pytest.mark.parametrize("name", STEPS)
def test_a_step_takes_one_launch(name: str, request: pytest.FixtureRequest) -> None:
    """The same as the PyTorch back end's, Gramian, method and combination one after another; heads cost no launch."""
    method, groups, beside, operator = STEPS[name]
    expected, grads, _ = step(method(), groups, **beside())
    request.getfixturevalue("one_launch")
    calls = request.getfixturevalue("triton_serves_the_cpu")
    info, found, _ = step(method(), groups, **beside())
    assert calls == [operator]
    for told in ("gramian", "weights", "targets", "kept", "step_scale"):
        a, b = getattr(info, told), getattr(expected, told)
        assert (a is None) == (b is None)
        if a is not None:
            # 10: weights magnify the Gramian's rounding, and targets follow cosines.
            assert_near(a, b, b.abs().max(), 10 * TOLERANCES[F32])
    for a, b in zip(found, grads, strict=True):
        assert_near(a, b, b.abs().max(), 10 * TOLERANCES[F32])


class Halved(gk.PCGrad):
    def weights(self, M: Tensor) -> Tensor:
        return super().weights(M) / 2

    def solution(self, M: Tensor, present: Tensor | None) -> Solution:
        return Solution(self.weights(M))


@interpreter.interpreted
@pytest.mark.parametrize("made", [Halved, gk.Sum])
def test_other_methods_go_step_by_step(made: Callable[[], gk.Aggregator], request: pytest.FixtureRequest) -> None:
    request.getfixturevalue("one_launch")
    calls = request.getfixturevalue("triton_serves_the_cpu")
    step(made(), suppression=gk.Suppression(0.4, seed=1))
    assert "gramian.tensors" in calls
    assert "combine.tensors" in calls


@interpreter.interpreted
def test_an_update_combines_in_its_own_step(request: pytest.FixtureRequest) -> None:
    request.getfixturevalue("one_launch")
    calls = request.getfixturevalue("triton_serves_the_cpu")
    update(gk.PCGrad(), "model", None)
    assert calls == ["gramian.tensors", "pcgrad", "adamw"]
