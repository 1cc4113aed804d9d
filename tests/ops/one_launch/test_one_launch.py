"""The whole surgery in one launch, and the steps that take it.

Everything is compared with the reference on explicit vectors. What is left unwritten is NaN, and so is all that a mask
drops from both passes, and the memory that a launch works in.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import gradkern as gk
from gradkern import reference
from gradkern.aggregators.base import Solution
from gradkern.ops import operators
from gradkern.ops.arguments import Mask, ProjectionArguments, TaskGrads
from gradkern.ops.dtypes import arithmetic_dtype
from gradkern.ops.layout import TILE
from gradkern.ops.partners import ORDERED, PARTNERS
from tests import interpreter
from tests.step.test_no_host_reads import ORDER, RefusesReads, step, update
from tests.tolerances import DTYPES, TOLERANCES, assert_near

pytest.importorskip("triton", reason="no Triton on this platform")
if (reason := interpreter.why_not()) and not torch.cuda.is_available():
    pytest.skip(reason, allow_module_level=True)

from gradkern.kernels import settings
from gradkern.kernels.launch import Launch
from gradkern.ops.one_launch import work_list, workspace
from gradkern.ops.one_launch.surgery import pcgrad_matrix, pcgrad_matrix_out, surgery

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
MASK_STATE = (-3, 1 << 40, int(0.45 * (1 << 32)))


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with interpreter.unwritten_is_nan():
        yield


@pytest.fixture
def one_launch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels serve the device, and all sizes of at most four tasks take one launch."""
    if DEVICE.type == "cpu":
        request.getfixturevalue("triton_serves_the_cpu")
    sizes = [2, 4, 8]
    monkeypatch.setattr(settings, "ONE_LAUNCH", {(T, size): range(1 << 62) for T in range(1, 5) for size in sizes})


@dataclass
class Problem:
    """Arguments of a surgery, and the same as the reference takes it.

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
    products_masked: bool = False
    mean: bool = False
    missing: bool = True

    def __post_init__(self) -> None:
        J = torch.randn(self.T, sum(self.numels), dtype=F64).to(self.dtype)
        if self.block is None:
            self.keep = torch.ones(J.shape[1], dtype=torch.bool)
        else:
            seed, number, threshold = MASK_STATE
            self.keep = torch.cat(
                [
                    reference.kept(seed + (1 << 64), number, threshold / (1 << 32), self.block, unit, numel)
                    if unit >= 0
                    else torch.ones(numel, dtype=torch.bool)
                    for unit, numel in zip(UNITS, self.numels, strict=True)
                ]
            )
        hidden = torch.where(self.keep, J, torch.nan) if self.products_masked else J  # what is never looked at
        self.grads: list[Tensor | None] = [
            part.to(DEVICE, copy=True) for row in hidden for part in row.split(self.numels)
        ]
        self.J = J.double()
        if self.missing and self.T > 1:
            n = len(self.numels)
            for t, k in ((1, 0), (0, n - 1), *((t, 5 % n) for t in range(self.T - 1))):
                self.grads[t * n + k] = None
                self.J[t, sum(self.numels[:k]) : sum(self.numels[: k + 1])] = 0
        self.order_keys = torch.rand(self.n_segments, self.T, self.T)
        self.out = [torch.full((numel,), torch.nan, dtype=self.dtype, device=DEVICE) for numel in self.numels]
        self.kept = None if self.block is None else torch.tensor(5, device=DEVICE)

    def pcgrad(self, partner: str = "all") -> ProjectionArguments:
        """Return PCGrad as the operator takes it."""
        order_keys = self.order_keys.to(DEVICE) if partner in ORDERED else None
        return ProjectionArguments(order_keys, partner, None, None, 0.0, self.mean)

    def gradvac(self, targets: Tensor, update_mask: Tensor, beta: float) -> ProjectionArguments:
        """Return GradVac as the operator takes it."""
        return ProjectionArguments(self.order_keys.to(DEVICE), "all", targets, update_mask.to(DEVICE), beta, self.mean)

    def arguments(self, method: ProjectionArguments) -> tuple[Any, ...]:
        """Return the arguments of the operator."""
        rows = TaskGrads(self.grads, self.segments, self.n_segments)
        mask = None if self.block is None else Mask(UNITS, self.block, torch.tensor(MASK_STATE, device=DEVICE))
        return rows, method, self.out, mask, self.products_masked, self.kept

    def solve(self, method: ProjectionArguments) -> tuple[Tensor, Tensor]:
        """Return Gramians and weights, and fill ``out``."""
        return surgery(*self.arguments(method))

    def orders(self, s: int) -> list[list[int]]:
        """Return the order in which each task visits the others."""
        return self.order_keys[s].argsort(-1).tolist()

    def columns(self, s: int) -> Tensor:
        """Return (P,) bool: the columns of a segment."""
        return torch.repeat_interleave(torch.tensor(self.segments) == s, torch.tensor(self.numels))

    def rows(self, s: int) -> list[Tensor]:
        """Return the vectors whose dot products a segment has."""
        J = torch.where(self.keep, self.J, 0.0) if self.products_masked else self.J
        return list(J[:, self.columns(s)])

    def check(self, results: tuple[Tensor, Tensor], method: Callable[[list[Tensor], int], Tensor]) -> None:
        """Compare results with ``method``, which gives (T, T) coefficients of a segment."""
        M, w = (result.cpu() for result in results)
        wide = arithmetic_dtype(self.dtype)
        assert M.dtype == w.dtype == wide
        assert M.shape == (self.n_segments, self.T, self.T)
        assert w.shape == M.shape[:-1]
        out = torch.cat([o.cpu() for o in self.out])
        for s in range(self.n_segments):
            rows = self.rows(s)
            expected = reference.gramian(rows)
            norms = expected.diagonal().sqrt()
            assert_near(M[s], expected, torch.outer(norms, norms), TOLERANCES[wide])
            C = method(rows, s)
            weights = C.sum(0) / (self.T if self.mean else 1)
            # 10: a coefficient is some quotients of dot products, each as far off as these.
            assert_near(w[s], weights, 1 + C.abs().sum(), 10 * TOLERANCES[wide])
            self._check_combined(out, s, w[s].double())
        self._check_combined(out, -1, torch.ones(self.T, dtype=F64))
        assert not out[~self.keep].any()
        if self.kept is not None:
            masked = torch.repeat_interleave(torch.tensor(UNITS) >= 0, torch.tensor(self.numels))
            assert int(self.kept) == 5 + int((self.keep & masked).sum())
            self.kept.fill_(5)

    def _check_combined(self, out: Tensor, s: int, w: Tensor) -> None:
        columns = self.columns(s)
        J = self.J[:, columns]
        expected = torch.where(self.keep[columns], reference.combine(list(J), w.tolist()), 0.0)
        scale = (w[:, None] * J).abs().sum(0) + torch.finfo(self.dtype).smallest_normal
        assert_near(out[columns], expected, scale, TOLERANCES[self.dtype])


def tagged(rows: list[Tensor]) -> list[Tensor]:
    """Return the rows, each followed by a unit vector too small for dot products, but not for :func:`coefficients`."""
    tags = TINY * torch.eye(len(rows), dtype=F64)
    return [torch.cat((row, tag if row.any() else 0 * tag)) for row, tag in zip(rows, tags, strict=True)]


def coefficients(modified: list[Tensor], rows: list[Tensor]) -> Tensor:
    """Return (T, T), which combine the tagged rows into the modified ones; a row of zeros is left as it is."""
    C = torch.stack([g[-len(rows) :] for g in modified]) / TINY
    return C + torch.diag(torch.tensor([float(not row.any()) for row in rows], dtype=F64))


TINY = 1e-30


def check_pcgrad(given: Problem, partner: str = "all") -> tuple[Tensor, Tensor]:
    results = given.solve(given.pcgrad(partner))

    def method(rows: list[Tensor], s: int) -> Tensor:
        return coefficients(reference.pcgrad_of(partner, tagged(rows), given.orders(s)), rows)

    given.check(results, method)
    return results


def check_gradvac(given: Problem, beta: float = 0.25) -> None:
    """Compare a step from random targets, one task of which does not move its own."""
    before = torch.rand(given.n_segments, given.T, given.T, dtype=F64) - 0.5
    update_mask = torch.tensor([True, False, True, True])[: given.T]
    targets = before.to(DEVICE, copy=True)
    results = given.solve(given.gradvac(targets, update_mask, beta))
    eps = torch.finfo(arithmetic_dtype(given.dtype)).eps
    tolerance = 10 * TOLERANCES[arithmetic_dtype(given.dtype)]  # as for the weights

    def method(rows: list[Tensor], s: int) -> Tensor:
        modified, moved = reference.gradvac(tagged(rows), given.orders(s), before[s], beta, eps)
        expected = torch.where(update_mask.unsqueeze(-1), moved, before[s])
        assert_near(targets[s].cpu(), expected, 1.0, tolerance)
        assert torch.equal(targets[s, ~update_mask].cpu(), before[s, ~update_mask])
        return coefficients(modified, rows)

    given.check(results, method)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 2, 3, 4])
def test_pcgrad(T: int, dtype: torch.dtype) -> None:
    check_pcgrad(Problem(T, dtype))


@pytest.mark.parametrize(("T", "dtype"), [(1, F32), (3, BF16), (4, F64)])
def test_gradvac(T: int, dtype: torch.dtype) -> None:
    check_gradvac(Problem(T, dtype))


@pytest.mark.parametrize("partner", PARTNERS)
def test_the_mean_of_the_modified_gradients(partner: str) -> None:
    check_pcgrad(Problem(3, F32, mean=True), partner)


@pytest.mark.parametrize(("T", "dtype"), [(1, F32), (2, F64), (3, BF16), (4, F32)])
@pytest.mark.parametrize("partner", [partner for partner in PARTNERS if partner != "all"])
def test_pcgrad_of_one_partner_or_their_average(partner: str, T: int, dtype: torch.dtype) -> None:
    check_pcgrad(Problem(T, dtype), partner)


@pytest.mark.parametrize("partner", PARTNERS)
def test_a_task_without_a_gradient_is_nobodys_partner(partner: str) -> None:
    given = Problem(4, F32, missing=False)
    for k in range(len(NUMELS)):
        given.grads[2 * len(NUMELS) + k] = None
    given.J[2] = 0
    given.order_keys[..., 2] = 0  # first of all in every order
    check_pcgrad(given, partner)


@pytest.mark.parametrize("partner", ["most_similar", "most_different"])
def test_of_partners_of_equal_cosine_the_first(partner: str) -> None:
    """Tasks 1, 2 and 3 are of one direction, at lengths of powers of two, so that nothing is rounded."""
    row = torch.randint(-4, 5, (60,), dtype=F64)
    given = Problem(4, F32, [60], [0], 1, missing=False)
    given.grads = [(c * row).float().to(DEVICE) for c in (-1.0, 1.0, 4.0, 0.5)]
    _, w = given.solve(given.pcgrad(partner))
    # Task 0 is projected onto task 1; the others onto task 0, or, most similar to each other, onto nobody.
    expected = [1.0, 2.0, 1.0, 1.0] if partner == "most_similar" else [1 + 1 + 4 + 0.5, 2.0, 1.0, 1.0]
    assert w[0].tolist() == expected


def test_one_order_for_all_segments() -> None:
    given = Problem(3, F32)
    given.order_keys = given.order_keys[:1].expand(N_SEGMENTS, 3, 3)
    results = given.solve(given.pcgrad())
    given.order_keys = given.order_keys[:1]
    assert_same(given.solve(given.pcgrad()), results)


@pytest.mark.parametrize("products_masked", [False, True])
@pytest.mark.parametrize(
    ("T", "dtype", "block", "partner"),
    [
        (3, F32, 1, "all"),
        (2, BF16, 1, "random"),
        (4, F64, 128, "average"),
        (3, F32, 128, "most_similar"),
        (4, BF16, 1, "most_different"),
        (3, F32, 3, "all"),
    ],
)
def test_suppression(T: int, dtype: torch.dtype, block: int, partner: str, products_masked: bool) -> None:
    check_pcgrad(Problem(T, dtype, block=block, products_masked=products_masked), partner)


@pytest.mark.parametrize(("block", "mean"), [(1, True), (3, False)])
@pytest.mark.parametrize("products_masked", [False, True])
def test_gradvac_under_suppression(products_masked: bool, block: int, mean: bool) -> None:
    check_gradvac(Problem(3, F32, block=block, products_masked=products_masked, mean=mean))


def test_the_count_of_kept_entries_may_be_left_out() -> None:
    given = Problem(2, F32, block=128)
    check_pcgrad(given)
    expected = [o.clone() for o in given.out]
    given.kept = None
    check_pcgrad(given)
    assert_same(given.out, expected)


def test_rows_anywhere_in_memory() -> None:
    """Rows lie off the boundaries where 128-bit loads are, and results on them; then the other way round."""
    for of_rows, of_out in ((1, 0), (0, 1)):
        given = Problem(3, F32)
        given.grads = [None if g is None else shifted(g, of_rows) for g in given.grads]
        given.out = [shifted(o, of_out) for o in given.out]
        check_pcgrad(given)


def shifted(t: Tensor, pad: int) -> Tensor:
    buffer = torch.full((pad + len(t),), torch.nan, dtype=t.dtype, device=t.device)
    buffer[pad:] = t
    return buffer[pad:]


def test_a_result_in_the_place_of_a_row() -> None:
    given = Problem(3, F32)
    given.out = [next(g for g in given.grads[k :: len(NUMELS)] if g is not None) for k in range(len(NUMELS))]
    check_pcgrad(given)


def test_many_small_segments() -> None:
    numels = [(7 * k) % 40 for k in range(16)]
    segments = [(k * 12) % 17 - 1 for k in range(16)]
    check_pcgrad(Problem(2, F32, numels, segments, 16, missing=False))


def test_no_segment_at_all() -> None:
    rows = TaskGrads([torch.ones(5, device=DEVICE), torch.ones(5, device=DEVICE)], [-1], 0)
    out = [torch.zeros(5, device=DEVICE)]
    M, w = surgery(
        rows, ProjectionArguments(torch.zeros(1, 2, 2, device=DEVICE), "all", None, None, 0.0, mean=False), out
    )
    assert M.shape == (0, 2, 2)
    assert w.shape == (0, 2)
    assert torch.equal(out[0].cpu(), torch.full((5,), 2.0))


def test_nothing_but_what_is_outside_surgery() -> None:
    given = Problem(2, F32, [5, TILE + 3], [-1, -1], 2, missing=False)
    check_pcgrad(given)
    check_gradvac(given)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_moves_no_target_of_any_segment(value: float) -> None:
    given = Problem(3, F32)
    given.grads[0][17] = value  # type: ignore[index]
    before = torch.rand(N_SEGMENTS, 3, 3, dtype=F64)
    targets = before.to(DEVICE, copy=True)
    M, _ = given.solve(given.gradvac(targets, torch.ones(3, dtype=torch.bool), 0.5))
    assert M.isfinite().all(-1).all(-1).tolist() == [True, False, True, True]
    assert torch.equal(targets.cpu(), before)
    assert all(o.isfinite().all() for o, s in zip(given.out, SEGMENTS, strict=True) if s != 1)


def test_bad_arguments_are_named_before_anything_changes() -> None:
    given = Problem(3, F32)
    pcgrad, update_mask = given.pcgrad(), torch.ones(3, dtype=torch.bool)
    targets = torch.zeros(N_SEGMENTS, 3, 3, dtype=F64, device=DEVICE)
    with pytest.raises(ValueError, match=r"order_keys must be \(4, 3, 3\) or \(1, 3, 3\), got \(2, 3, 3\)"):
        given.solve(pcgrad._replace(order_keys=pcgrad.order_keys[:2]))
    for wrong in (pcgrad._replace(order_keys=None), pcgrad._replace(partner="average")):
        with pytest.raises(ValueError, match=f"order_keys must be .* with partner='{wrong.partner}'"):
            given.solve(wrong)
    for bad in (targets.float(), targets.mT):
        with pytest.raises(ValueError, match="targets must be contiguous float64"):
            given.solve(given.gradvac(bad, update_mask, 0.1))
    with pytest.raises(ValueError, match=r"update_mask must be of shape \(3,\), got \(2,\)"):
        given.solve(given.gradvac(targets, update_mask[:2], 0.1))
    given.block = 0
    with pytest.raises(ValueError, match="block must be from 1 to 1073741824, got 0"):
        given.solve(pcgrad)
    assert all(o.isnan().all() for o in given.out)


def test_nothing_is_read_on_the_host() -> None:
    given = Problem(2, F32, block=128)
    for partner in ("random", "most_similar"):
        arguments = given.arguments(given.pcgrad(partner))
        with RefusesReads():
            surgery(*arguments)


def test_the_operator_keeps_torchs_contract(one_launch: None) -> None:
    """With and without a mask, each optional tensor given and not: seconds each in the interpreter."""
    targets, update_mask = torch.zeros(N_SEGMENTS, 3, 3, dtype=F64, device=DEVICE), torch.ones(3, dtype=torch.bool)
    dense, masked = Problem(3, F32), Problem(3, F32, block=1)
    methods = [(dense, dense.pcgrad("average")), (masked, masked.gradvac(targets, update_mask, 0.1))]
    for given, method in methods:
        opcheck(operators.surgery.overload, tuple(operators.surgery.flattened(*given.arguments(method))))


# Matrices


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched so far."""
    names: list[str] = []
    run = Launch.run

    def noted(launch: Launch, device: torch.device) -> None:
        names.append(launch.kernel.__name__.removesuffix("_kernel"))
        run(launch, device)

    monkeypatch.setattr(Launch, "run", noted)
    return names


def check_matrix(T: int, P: int, partner: str, mean: bool) -> None:
    J, order_keys = torch.randn(T, P + 3)[:, :P], torch.rand(1, T, T)
    out = pcgrad_matrix(J.to(DEVICE), order_keys.to(DEVICE) if partner in ORDERED else None, partner, mean)
    modified = torch.stack(reference.pcgrad_of(partner, list(J), order_keys[0].argsort(-1).tolist()))
    # A modified gradient is no longer than the original one: as far off as the sum of all, magnified as above.
    expected = modified.mean(0) if mean else modified.sum(0)
    assert_near(out.cpu(), expected, J.double().abs().sum(0), 10 * TOLERANCES[F32])


@pytest.mark.parametrize("T", [1, 2, 4])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("partner", PARTNERS)
def test_a_matrix(T: int, partner: str, mean: bool, one_launch: None, launches: list[str]) -> None:
    for P in (0, TILE + 9):
        check_matrix(T, P, partner, mean)
    assert launches == ["surgery", "surgery"]


def test_a_matrix_in_given_memory(one_launch: None, launches: list[str]) -> None:
    J, order_keys = torch.randn(3, TILE + 9, device=DEVICE), torch.rand(1, 3, 3, device=DEVICE)
    out = torch.full_like(J[0], torch.nan)
    pcgrad_matrix_out(J, order_keys, "all", False, out)
    assert torch.equal(out, pcgrad_matrix(J, order_keys, "all", False))
    assert launches == ["surgery", "surgery"]


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("partner", ["all", "average"])
def test_a_matrix_of_other_sizes_takes_a_launch_for_each_step(partner: str, mean: bool, launches: list[str]) -> None:
    check_matrix(3, 60, partner, mean)
    assert launches == ["gramian", "reduce", "pcgrad", "combine"]


# Programs that share the work


def everything(given: Problem) -> list[Tensor]:
    """Return all that a step of GradVac writes, in memory of its own."""
    targets = torch.full((given.n_segments, given.T, given.T), 0.25, dtype=F64, device=DEVICE)
    given.out = [torch.full_like(o, torch.nan).share_memory_() for o in given.out]
    results = given.solve(given.gradvac(targets, torch.ones(given.T, dtype=torch.bool), 0.1))
    return [*results, targets, *(o.clone() for o in given.out)]


def assert_same(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_more_programs_than_work_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    given = Problem(3, F32, block=128)
    expected = everything(given)
    monkeypatch.setattr("gradkern.ops.one_launch.surgery.n_programs", lambda device, n_items: n_items + 20)
    assert_same(everything(given), expected)


@pytest.fixture
def groups_of_two(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Partial sums are added up by twos."""
    for module in ("gradkern.ops.one_launch.work_list", "gradkern.kernels.surgery"):
        monkeypatch.setattr(f"{module}.FOLD", 2)
    work_list.work_list.cache_clear()
    yield
    work_list.work_list.cache_clear()


@interpreter.interpreted
def test_programs_that_run_at_once_give_the_same_bits(groups_of_two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three programs wait for each other, because combinations come close behind their dot products."""
    monkeypatch.setattr(work_list, "LAG", {4: 1})
    monkeypatch.setattr(workspace, "_of_stream", {})
    numels = [300, 5, 2 * TILE + 7, 40, 1, 700, 33]
    given = Problem(2, F32, numels, [0, 1, 2, 3, 4, 5, -1], 7, missing=False)
    expected = everything(given)
    with interpreter.programs_at_once(3):
        for _ in range(5):
            assert_same(everything(given), expected)
            assert not any(shared.any() for shared in workspace._of_stream.values())


def test_partial_sums_of_many_groups(groups_of_two: None) -> None:
    """There are more groups than are added up at a time, and one is not full."""
    check_pcgrad(Problem(2, F64, [4 * TILE + 5, 3], [1, 0], 2, missing=False))


def test_counters_are_zero_again_for_whoever_comes_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "_of_stream", {})
    few = Problem(3, F32, [5, 9], [0, -1], 1, missing=False)
    many = Problem(3, F32, [5] * 12, [*range(12)], 12, missing=False)
    expected = everything(few)
    for given in (few, many, few):
        check_gradvac(given)
        (shared,) = workspace._of_stream.values()
        assert not shared.any()
    assert_same(everything(few), expected)


def test_again_and_again_the_same_bits() -> None:
    """A GPU, where programs run at once, does it a thousand times; the interpreter always has the same order."""
    if DEVICE.type == "cpu":
        given, times = Problem(2, F32, [40, 9], [0, 1], 2, missing=False), 10
    else:
        numels, segments = [700_000, 40 * TILE, *[300] * 60, 90_000], [*range(62), -1]
        given, times = Problem(3, F32, numels, segments, 62, missing=False), 1000
    expected = everything(given)
    for _ in range(times):
        assert_same(everything(given), expected)


def launched(given: Problem) -> Callable[[], list[Tensor]]:
    """Return a launch of PCGrad whose arguments are on the device already, so that the host waits for nothing."""
    arguments = given.arguments(given.pcgrad())

    def run() -> list[Tensor]:
        return [*surgery(*arguments), *given.out]

    return run


@needs_gpu
@pytest.mark.parametrize("replayed", [False, True])
def test_two_streams_at_once(replayed: bool) -> None:
    """Each stream has counters of its own, and so has a captured launch; both streams work at the same time."""
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


# Steps


STEPS: dict[str, tuple[Callable[[], gk.Aggregator], str, Callable[[], dict[str, Any]]]] = {
    "pcgrad": (lambda: gk.PCGrad(order=ORDER), "model", dict),
    "mean over groups": (lambda: gk.PCGrad("random", ORDER, "mean"), "module", dict),
    "average over groups": (lambda: gk.PCGrad("average"), "parameter", dict),
    "most similar": (lambda: gk.PCGrad("most_similar"), "model", lambda: {"suppression": suppression("all")}),
    "most different": (lambda: gk.PCGrad("most_different"), "module", lambda: {"memory": True}),
    "gradvac": (lambda: gk.GradVac(0.5, ORDER), "parameter", dict),
    "update": (lambda: gk.PCGrad(order=ORDER), "model", lambda: {"suppression": suppression("update")}),
    "all": (lambda: gk.GradVac(0.5, ORDER), "model", lambda: {"suppression": suppression("all")}),
    "kappa": (lambda: gk.PCGrad(order=ORDER), "model", lambda: {"conflict_lr": gk.ConflictLR()}),
    "memory": (lambda: gk.GradVac(0.5, ORDER), "model", lambda: {"memory": True}),
}


def suppression(scope: str) -> gk.Suppression:
    return gk.Suppression(0.4, 2, scope, seed=1)


@interpreter.interpreted
@pytest.mark.parametrize("name", STEPS)
def test_a_step_takes_one_launch(name: str, request: pytest.FixtureRequest) -> None:
    """Its results are those of the PyTorch back end's three operators; heads cost no launch."""
    method, groups, beside = STEPS[name]
    expected, grads, _ = step(method(), groups, **beside())
    request.getfixturevalue("one_launch")
    kernels = request.getfixturevalue("launches")
    info, found, _ = step(method(), groups, **beside())
    assert kernels == ["surgery"]
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


BY_STEPS = ["gramian.tensors", "pcgrad", "combine.tensors"]


@interpreter.interpreted
@pytest.mark.parametrize("made", [Halved, gk.Sum])
def test_other_methods_go_step_by_step(
    made: Callable[[], gk.Aggregator], one_launch: None, triton_serves_the_cpu: list[str]
) -> None:
    step(made(), suppression=gk.Suppression(0.4, seed=1))
    assert "gramian.tensors" in triton_serves_the_cpu
    assert "combine.tensors" in triton_serves_the_cpu


@interpreter.interpreted
def test_an_update_combines_in_its_own_step(one_launch: None, triton_serves_the_cpu: list[str]) -> None:
    update(gk.PCGrad(), "model", None)
    assert triton_serves_the_cpu == ["gramian.tensors", "pcgrad", "adamw"]


@interpreter.interpreted
def test_a_step_without_one_of_the_tasks_goes_step_by_step(one_launch: None, triton_serves_the_cpu: list[str]) -> None:
    p = torch.ones(5, requires_grad=True)
    opt = gk.SurgeryOptimizer(torch.optim.SGD([p], lr=0.1), gk.PCGrad(), memory=True)
    opt.backward([p.sum(), -p.square().sum()])
    opt.backward([p.sum(), None])
    assert triton_serves_the_cpu == ["surgery", *BY_STEPS]


@interpreter.interpreted
def test_the_table_says_who_takes_one_launch(triton_serves_the_cpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes count all gradients that are summed, also those of unshared parameters."""
    for begin, taken in ((14, ["surgery"]), (15, BY_STEPS)):
        monkeypatch.setattr(settings, "ONE_LAUNCH", {(3, 4): range(begin, 28), (2, 4): range(14)})
        for T, dtype, expected in ((3, F32, taken), (2, F32, BY_STEPS), (3, F64, BY_STEPS), (5, F32, BY_STEPS)):
            triton_serves_the_cpu.clear()
            check_small_step(T, dtype)
            assert triton_serves_the_cpu == expected


def check_small_step(T: int, dtype: torch.dtype) -> None:
    """Compare a step of 5 shared and 9 unshared numbers with the reference."""
    p, q = torch.zeros(5, dtype=dtype, requires_grad=True), torch.zeros(9, dtype=dtype, requires_grad=True)
    J, K = torch.randn(T, 5, dtype=dtype), torch.randn(T, 9, dtype=dtype)
    losses = [g @ p + h @ q for g, h in zip(J, K, strict=True)]
    gk.backward(losses, [p, q], aggregator=gk.PCGrad(order=list(range(T))), shared=[p])
    modified = reference.pcgrad(list(J), [range(T)] * T)
    assert_near(p.grad, torch.stack(modified).sum(0), J.abs().sum(0), 10 * TOLERANCES[dtype])
    assert_near(q.grad, K.double().sum(0), K.abs().sum(0), TOLERANCES[dtype])


@interpreter.interpreted
def test_a_back_end_without_the_operator_goes_step_by_step(one_launch: None, triton_serves_the_cpu: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.delitem(operators.surgery.implementations, "cpu")
        check_small_step(3, F32)
    assert triton_serves_the_cpu == BY_STEPS


def test_amd_has_no_such_operator() -> None:
    code = """
import torch
torch.version.hip = "6.0"
from gradkern.ops import operators
print("cuda" in operators.pcgrad_matrix.implementations, "cuda" in operators.surgery.implementations)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True", "False"]
