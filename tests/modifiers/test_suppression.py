"""Gradient suppression: the mask's bits and statistics, and what a masked step does."""

import copy
import io
import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.library import opcheck

import gradkern as gk
from gradkern import reference
from gradkern.ops import operators
from gradkern.ops.arguments import Mask, TaskGrads
from gradkern.ops.philox import dropped, dropped_at
from tests.interpreter import interpreted
from tests.models import MultiHead, flat, problem, task_gradients
from tests.tolerances import DTYPES, TOLERANCES, assert_near

ORDER = [[0, 1, 2], [2, 0, 1], [1, 2, 0]]
BLOCKS = [1, 3, 4, 64, 100, 4096]
HUGE = 2**64 - 3


def mask_state(seed: int, step: int, p: float) -> Tensor:
    """The state of the operators' mask."""
    signed = [v - 2**64 if v >= 2**63 else v for v in (seed, step)]
    return torch.tensor([*signed, round(p * 2**32)])


def test_philox_gives_the_words_of_its_authors() -> None:
    """Known answers of Random123, its first implementation: philox4x32-10 of zeros, of ones, and of digits of π."""
    ones = 2**64 - 1
    known = [
        (0, 0, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (ones, ones, -1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            0x299F31D0A4093822,
            0x0370734413198A2E,
            0x85A308D3243F6A88 - 2**64,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]
    for seed, step, counter, expected in known:
        assert reference.philox(seed, step, torch.tensor([counter]))[0].tolist() == expected


@pytest.mark.parametrize("first", [0, 4, 2**32 - 8, 2**32, 2**34 - 4, 2**40])
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (1, 2**31), (2**63 + 5, HUGE), (HUGE, 2**32 - 1)])
def test_the_bits_are_the_references(seed: int, step: int, first: int) -> None:
    expected = ~reference.kept(seed, step, 0.45, 1, first, 1001)
    assert torch.equal(dropped(first, 1001, mask_state(seed, step, 0.45)), expected)
    assert torch.equal(dropped_at(first + torch.arange(1001), mask_state(seed, step, 0.45)), expected)


def test_first_units() -> None:
    numels = [1, 0, 5, 4096, 4097, 12, 2**35]
    for block in BLOCKS:
        assert gk.Suppression(0.5, block).first_units(numels) == reference.first_units(numels, block)


@pytest.mark.parametrize("p", [0.3, 0.45, 0.6])
@pytest.mark.parametrize("first", [0, 2**33, 2**34 + 4])
def test_the_rate_and_the_independence_of_the_mask(first: int, p: float) -> None:
    n = 400_000
    a, b = (dropped(first, n, mask_state(7, step, p)).double() for step in (3, 4))
    other_seed, far = (
        dropped(first, n, mask_state(8, 3, p)).double(),
        dropped(first + 2**34, n, mask_state(7, 3, p)).double(),
    )
    bound = 5 * math.sqrt(p * (1 - p) / n)  # five standard deviations of a mean
    assert abs(a.mean().item() - p) < bound
    # Pairs of independent bits: both dropped with p², of variance p² (1 - p²).
    both = 5 * math.sqrt(p**2 * (1 - p**2) / n)
    pairs = [
        (a, b),
        (a, other_seed),
        (a, far),
        (a[1:], a[:-1]),
        (a[4:], a[:-4]),
        (a[4096:], a[:-4096]),
        (a[1:], b[:-1]),
    ]
    for x, y in pairs:
        assert abs((x * y).mean().item() - p**2) < both


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    ("back_end", "dtype"),
    [
        *(("pytorch", dtype) for dtype in DTYPES),
        # The kernels in the other dtypes: test_masked_kernels.py.
        *(pytest.param("triton", dtype, marks=interpreted) for dtype in (torch.float32, torch.bfloat16)),
    ],
    indirect=["back_end"],
)
def test_masked_operators(dtype: torch.dtype, block: int, back_end: str) -> None:
    """Several tensors, one not masked, one without a gradient, in two segments, NaN wherever nothing is read."""
    numels, segments, unmasked = [5000, 7, 0, 4100, 300], [0, 1, 0, 1, 0], 3
    seed, step, p = 11, 5, 0.45
    units = reference.first_units(numels, block)
    keep = [reference.kept(seed, step, p, block, u, n) for u, n in zip(units, numels, strict=True)]
    keep[unmasked][:] = True
    units[unmasked] = -1
    rows = [[torch.randn(n).to(dtype) for n in numels] for _ in range(3)]
    for row in rows:
        for g, kept in zip(row, keep, strict=True):
            g[~kept] = torch.nan
    erased = [[torch.where(k, g, 0).double() for g, k in zip(row, keep, strict=True)] for row in rows]
    erased[1][0][:] = 0
    grads: list[Tensor | None] = [g for row in rows for g in row]
    grads[len(numels)] = None

    task_grads, mask = TaskGrads(grads, segments, 2), Mask(units, block, mask_state(seed, step, p))
    M = operators.gramian_tensors(task_grads, mask)
    for s in range(2):
        J = [torch.cat([g for g, n in zip(row, segments, strict=True) if n == s]) for row in erased]
        expected = reference.gramian(J)
        norms = expected.diagonal().sqrt()
        # Products and sums are in arithmetic dtype however the rows are stored.
        assert_near(M[s], expected, torch.outer(norms, norms), TOLERANCES[M.dtype])
    w = torch.randn(2, 3, dtype=torch.float64).to(torch.float64 if dtype == torch.float64 else torch.float32)
    out = [torch.full((n,), torch.nan, dtype=dtype) for n in numels]
    n_kept = torch.zeros((), dtype=torch.int64)
    operators.combine_tensors(task_grads, w, out, mask, n_kept)
    assert n_kept.item() == sum(int(k.sum()) for i, k in enumerate(keep) if i != unmasked)
    for k, (result, s) in enumerate(zip(out, segments, strict=True)):
        column = [row[k] for row in erased]
        size = reference.combine([g.abs() for g in column], w[s].abs().tolist())
        floor = torch.finfo(dtype).smallest_normal  # below it the last place no longer shrinks
        assert_near(result, reference.combine(column, w[s].tolist()), size + floor, TOLERANCES[dtype])
        assert (result[~keep[k]] == 0).all()


def test_operators_on_entries_keep_torchs_contract() -> None:
    grads = [torch.randn(50), torch.randn(9), None, torch.randn(9)]
    out = [torch.zeros(50), torch.zeros(9)]
    index = torch.tensor([3, 49, 50, 58])
    opcheck(operators.gather.overload, (grads, [50, 9], index))
    opcheck(operators.scatter.overload, (torch.randn(4), [50, 9], index, out))


def expected_step(
    model: MultiHead, losses: Sequence[Tensor], keep: Tensor, scope: str, order: list[list[int]]
) -> Tensor:
    trunk = list(model.trunk.parameters())
    J = [flat(g, trunk) for g in task_gradients(losses, trunk)]
    return reference.suppressed(J, keep, scope, lambda rows: reference.pcgrad(rows, order))


@pytest.mark.parametrize("scope", ["update", "all"])
@pytest.mark.parametrize("block", [1, 4, 16])
def test_a_step_is_the_papers(block: int, scope: str, back_end: str) -> None:
    """Equation 11, over steps: the trunk is masked, anew each time, and the heads are not."""
    model, x, y = problem()
    suppression = gk.Suppression(0.45, block, scope, seed=5)
    named = list(model.named_parameters())
    units = reference.first_units([p.numel() for _, p in named], block)
    first_unit = {name: unit for (name, _), unit in zip(named, units, strict=True)}
    masks = []
    for step in range(3):
        model.zero_grad()
        losses = model.losses(x, y)
        keep = torch.cat(
            [
                reference.kept(5, step, 0.45, block, first_unit[name], p.numel())
                for name, p in named
                if name.startswith("trunk")
            ]
        )
        masks.append(keep)
        expected = expected_step(model, losses, keep, scope, ORDER)
        plain = task_gradients(losses, list(model.heads.parameters()))
        info = gk.backward(losses, model, aggregator=gk.PCGrad(order=ORDER), suppression=suppression)
        trunk = list(model.trunk.parameters())
        found = flat([p.grad for p in trunk], trunk)
        # 10: weights of up to a few units multiply the rounding of the Gramian.
        assert_near(found, expected, expected.abs().max(), 10 * TOLERANCES[torch.float32])
        assert (found[~keep] == 0).all()
        assert info.kept is not None
        assert abs(info.kept.item() - keep.double().mean().item()) < 1e-6  # a float32 quotient
        for k, p in enumerate(model.heads.parameters()):
            assert torch.equal(p.grad, next(g[k] for g in plain if g[k] is not None))
    assert not any(torch.equal(a, b) for a, b in pairwise(masks))


@pytest.mark.parametrize("groups", ["model", "parameter"])
@pytest.mark.parametrize("scope", ["update", "all"])
@pytest.mark.parametrize(
    "method",
    [
        gk.Sum(),
        gk.Mean(),
        gk.Constant([1.0, -2.0, 0.5]),
        gk.PCGrad("average"),
        gk.GradVac(order=ORDER),
        gk.GradAttention(subset=16),
        gk.GradAttention(subset=16, update="subset"),
    ],
    ids=repr,
)
def test_every_method_takes_it(method: gk.Aggregator, scope: str, groups: str) -> None:
    model, x, y = problem()
    method = copy.deepcopy(method)  # some have state, of one model and its groups
    suppression = gk.Suppression(0.5, 2, scope, seed=1)
    info = gk.backward(model.losses(x, y), model, aggregator=method, suppression=suppression, groups=groups)
    named = list(model.named_parameters())
    units = reference.first_units([p.numel() for _, p in named], 2)
    for (name, p), unit in zip(named, units, strict=True):
        keep = reference.kept(1, 0, 0.5, 2, unit, p.numel())
        assert p.grad is not None
        g = p.grad.flatten()
        if name.startswith("trunk"):
            assert (g[~keep] == 0).all()
            assert (g[keep] != 0).any() or "subset'" in repr(method)  # of a small tensor nothing may be drawn
        else:
            assert (g != 0).all()
    assert info.kept is not None
    assert 0 < info.kept.item() < 1


def test_weighted_heads_of_a_scalarization_keep_their_weights() -> None:
    """They are part of Σ w_i L_i, masked or not."""
    model, x, y = problem()
    gk.backward(model.losses(x, y), model, aggregator=gk.Constant([1.0, -2.0, 0.5]))
    expected = [p.grad for p in model.heads.parameters()]
    model.zero_grad()
    suppression = gk.Suppression(0.5, seed=1)
    gk.backward(model.losses(x, y), model, aggregator=gk.Constant([1.0, -2.0, 0.5]), suppression=suppression)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.heads.parameters(), expected, strict=True))


def test_p_zero_changes_nothing() -> None:
    results = []
    for suppression in (None, gk.Suppression(0.0), gk.Suppression(0.0, 128, "all")):
        model, x, y = problem()
        info = gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad(order=ORDER), suppression=suppression)
        assert info.kept is None if suppression is None else info.kept.item() == 1
        results.append([p.grad for p in model.parameters()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_freezing_a_parameter_moves_no_mask() -> None:
    found = []
    for freeze in (False, True):
        model, x, y = problem()
        if freeze:
            model.trunk[0].weight.requires_grad_(False)
        gk.backward(model.losses(x, y), model, aggregator=gk.Sum(), suppression=gk.Suppression(0.5, seed=3))
        found.append(model.trunk[2].weight.grad == 0)
    assert found[0].any()
    assert torch.equal(*found)


def test_momentum_and_decay_still_move_a_dropped_entry() -> None:
    model, x, y = problem()
    inner = torch.optim.AdamW(model.named_parameters(), lr=0.1, weight_decay=0.5)
    opt = gk.SurgeryOptimizer(inner, gk.Sum(), suppression=gk.Suppression(0.5, seed=3))
    before = model.trunk[0].weight.detach().clone()
    opt.backward(model.losses(x, y))
    opt.step()
    w = model.trunk[0].weight
    assert w.grad is not None
    decayed = before * (1 - 0.1 * 0.5)
    assert torch.equal((w == decayed), (w.grad == 0))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_units_run_through_memory(memory_format: torch.memory_format) -> None:
    conv = nn.Conv2d(4, 6, 3, bias=False).to(memory_format=memory_format)
    out = conv(torch.randn(2, 4, 8, 8))
    gk.backward([out.sum(), out.square().sum()], conv, aggregator=gk.Sum(), suppression=gk.Suppression(0.5, 4, seed=2))
    g = conv.weight.grad
    assert g is not None
    keep = reference.kept(2, 0, 0.5, 4, 0, g.numel())
    assert torch.equal(g.as_strided((g.numel(),), (1,)) != 0, keep)


@pytest.mark.parametrize("scope", ["update", "all"])
def test_sparse_gradients_stay_sparse(scope: str) -> None:
    grads = []
    for sparse in (False, True):
        torch.manual_seed(0)
        embedding = nn.Embedding(20, 3, sparse=sparse)
        out = embedding(torch.tensor([1, 2, 1, 7, 19]))
        losses = [out.sum(), -(out * torch.randn(5, 3)).sum()]
        method = gk.PCGrad(order=[0, 1])
        gk.backward(losses, embedding, aggregator=method, suppression=gk.Suppression(0.4, 2, scope, seed=4))
        g = embedding.weight.grad
        assert g is not None
        assert g.is_sparse == sparse
        grads.append(g.to_dense())
    assert_near(grads[1], grads[0], grads[0].abs().max(), TOLERANCES[torch.float32])
    assert (grads[0][[1, 2, 7, 19]] == 0).any()


def test_resumed_the_stream_of_masks_goes_on() -> None:
    def masks(opt: gk.SurgeryOptimizer, model: MultiHead, x: Tensor, y: Tensor, n: int) -> list[Tensor]:
        found = []
        for _ in range(n):
            opt.zero_grad()
            opt.backward(model.losses(x, y))
            found.append(model.trunk[0].weight.grad == 0)
        return found

    def make(seed: int | None) -> tuple[gk.SurgeryOptimizer, MultiHead, Tensor, Tensor]:
        model, x, y = problem()
        inner = torch.optim.SGD(model.named_parameters(), lr=0.1)
        return gk.SurgeryOptimizer(inner, gk.Sum(), suppression=gk.Suppression(0.5, seed=seed)), model, x, y

    opt, *rest = make(HUGE)
    masks(opt, *rest, 3)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    expected = masks(opt, *rest, 3)
    fresh, *rest = make(None)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(masks(fresh, *rest, 3), expected, strict=True))
    assert not torch.equal(expected[0], expected[1])


def test_without_a_seed_torchs_own_decides() -> None:
    seeds = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        seeds.append(gk.Suppression(0.5).seed)
    assert seeds[0] == seeds[1] != seeds[2]


def test_a_step_that_raises_does_not_count() -> None:
    model, x, y = problem()
    suppression = gk.Suppression(0.5, seed=1)
    before = suppression.state_dict()
    with pytest.raises(ValueError, match="order is for 2 tasks"):
        gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad(order=[0, 1]), suppression=suppression)
    assert suppression.state_dict() == before
    assert all(p.grad is None for p in model.parameters())


def test_repr_is_exact() -> None:
    text = "Suppression(p=0.45, block=128, scope='all', seed=18446744073709551613)"
    assert repr(eval(text, {"Suppression": gk.Suppression})) == text


anything = st.one_of(st.floats(), st.integers(-3, 5), st.booleans(), st.text(max_size=3), st.none(), st.just(2**64))


@given(anything, anything, anything, anything)
def test_what_is_out_of_range_names_itself(p: object, block: object, scope: object, seed: object) -> None:
    def is_a(value: object, *kinds: type) -> bool:
        return isinstance(value, kinds) and not isinstance(value, bool)

    good = {
        "p": is_a(p, int, float) and 0 <= p < 1,
        "block": is_a(block, int) and 1 <= block <= 2**30,
        "scope": scope in ("update", "all"),
        "seed": seed is None or (is_a(seed, int) and 0 <= seed < 2**64),
    }
    given = {"p": p, "block": block, "scope": scope, "seed": seed}
    defaults = {"p": 0.5, "block": 1, "scope": "update", "seed": 0}
    for name, fine in good.items():
        arguments = {**defaults, name: given[name]}
        if fine:
            assert getattr(gk.Suppression(**arguments), name) == given[name] or given[name] is None
        else:
            with pytest.raises((TypeError, ValueError), match=f"{name} must be .*got "):
                gk.Suppression(**arguments)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "state_dict must hold 'seed' and 'step', got None"),
        ({"seed": 1}, "state_dict must hold 'seed' and 'step'"),
        ({"seed": 2**64, "step": 0}, "seed must be an integer from 0 to .*got 18446744073709551616"),
        ({"seed": 5, "step": "x"}, "step must be an integer, got 'x'"),
        ({"seed": 5, "step": -1}, "step must be an integer from 0 to .*got -1"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(state: object, message: str) -> None:
    suppression = gk.Suppression(0.5, seed=1)
    with pytest.raises((TypeError, ValueError), match=message):
        suppression.load_state_dict(state)
    assert suppression.state_dict() == {"seed": 1, "step": 0}


def test_a_step_without_numbers_does_not_count() -> None:
    suppression = gk.Suppression(0.5, seed=1)
    with torch.device("meta"):
        model = nn.Linear(3, 2)
        gk.backward(list(model(torch.ones(3))), model, aggregator=gk.PCGrad(), suppression=suppression)
        assert gk.Suppression(0.5).seed >= 0
    assert suppression.state_dict() == {"seed": 1, "step": 0}
