"""GradAttention: what its network converges to, that a step is exact and whole, and how entries are drawn."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import gradkern as gk
from gradkern import reference
from gradkern.aggregators.attention.grad_attention import GradAttention
from gradkern.arguments import shown
from tests.problems import PROBLEMS
from tests.tolerances import DTYPES, TOLERANCES, assert_near


def gradients(T: int, P: int = 300, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random rows around a common direction pointing both ways: about half of the pairs conflict."""
    return (torch.randn(T, P, dtype=torch.float64) + torch.randn(T, 1) * torch.randn(1, P)).to(dtype)


def small(**arguments: Any) -> GradAttention:
    return GradAttention(**{"subset": 64, "width": 16, **arguments})


def trained(T: int = 3, **arguments: Any) -> GradAttention:
    """A network whose weights depend on the entries: it was taught four problems at once, in the middle of which."""
    method = small(**{"lr": 1e-2, **arguments})
    G = torch.randn(4, T, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    for _ in range(30):
        alpha = method.weights(G @ G.mT, G[..., : method.subset])
    assert T == 2 or (alpha - alpha[0]).abs().amax(-1)[1:].min() > 1e-2  # two tasks agree with each other equally
    return method


def agreement(G: Tensor) -> Tensor:
    """r_i = Σ_j cos(g_i, g_j), from torch's own cosine on the vectors."""
    G = G.double()
    return torch.cosine_similarity(G.unsqueeze(-2), G.unsqueeze(-3), dim=-1).sum(-1)


def everything(method: GradAttention) -> dict[str, Any]:
    """All state, by name: tensors as copies, and the number of tasks."""
    state = copy.deepcopy(method.state_dict())
    extra = state.pop("_extra_state")
    moments = {f"{i}.{k}": v for i, entry in extra["adam"].items() for k, v in entry.items()}
    return {**state, **moments, "generator": extra["generator"], "tasks": extra["tasks"]}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], Tensor) else a[k] == b[k] for k in a
    )


def sequence(method: GradAttention, steps: int = 5, P: int = 200, T: int = 3) -> Tensor:
    """The weights of a few steps, with entries drawn by the method."""
    torch.manual_seed(11)  # for a method with no generator of its own
    draw = torch.Generator().manual_seed(11)
    G = torch.randn(T, P, generator=draw)
    return torch.stack([method.weights(G @ G.T, G[:, method.positions((P,), G.device)]) for _ in range(steps)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("T", [1, 2, 3, 7])
def test_weights_start_equal_and_always_sum_to_one(T: int, dtype: torch.dtype, device: torch.device) -> None:
    method = small(lr=1e-2)
    G = gradients(T, dtype=dtype).to(device)
    first = method.weights(G @ G.T, G[:, :64])
    assert torch.equal(first, torch.full((T,), 1 / T, dtype=dtype, device=device))
    for _ in range(20):
        alpha = method.weights(G @ G.T, G[:, :64])
        assert alpha.dtype == dtype
        assert not alpha.requires_grad
        assert (alpha >= 0).all()
        # T quotients of one sum, and the sum of them: a rounding each.
        assert abs(alpha.sum().item() - 1) <= 2 * T * torch.finfo(dtype).eps
    assert T == 1 or T == 2 or not torch.equal(alpha, first)  # two tasks agree with each other equally
    assert T > 1 or torch.equal(alpha, first)


@pytest.mark.parametrize(
    ("T", "tau", "redrawn"),
    [(2, 0.5, False), (3, 0.5, False), (3, 0.1, True), (5, 0.5, False), (5, 1.0, True)],
)
def test_converges_to_the_optimum(T: int, tau: float, redrawn: bool, device: torch.device) -> None:
    """By its default learning rate, in 250 steps. The exact optimum is softmax(r / τ)."""
    G = gradients(T, 5000, torch.float32).to(device)
    optimum = (agreement(G) / tau).softmax(-1)
    method = GradAttention(subset=256, entropy=tau)
    X = G[:, method.positions((5000,), G.device)]
    errors = []
    for _ in range(250):
        if redrawn:
            X = G[:, method.positions((5000,), G.device)]
        errors.append((method.weights(G @ G.T, X) - optimum).abs().max())
    assert T == 2 or errors[0] > 0.02  # two tasks agree with each other equally: their optimum is where they start
    assert torch.stack(errors[-20:]).max() < 1e-2


e = torch.eye(2, dtype=torch.float64)[0]
SPECIAL = {
    "duplicates and their opposite": (torch.stack([e, e, -e]), [1.0, 1.0, -1.0]),
    "a zero gradient": (torch.stack([e, 0 * e, e]), [2.0, 0.0, 2.0]),
    "none but zero gradients": (torch.zeros(3, 2, dtype=torch.float64), [0.0, 0.0, 0.0]),
    "tiny and huge": (torch.stack([1e-15 * e, 1e15 * e, -1e15 * e]), [1.0, 1.0, -1.0]),
    "parts of tiny and huge": (torch.stack([1e-15 * e, 1e15 * e.flip(0), 1e15 * e]), [2.0, 1.0, 2.0]),
}


@pytest.mark.parametrize("case", SPECIAL)
def test_special_gradients(case: str, device: torch.device) -> None:
    """r in closed form. The Gramian of the large ones holds 1e30, the square of which float32 does not."""
    G, r = SPECIAL[case]
    G = G.to(device, torch.float32)
    method = small(lr=3e-3)
    for _ in range(150):
        alpha = method.weights(G @ G.T, G)
    optimum = (torch.tensor(r, device=device) / 0.5).softmax(-1)
    assert (alpha - optimum).abs().max() < 1e-2


def test_a_cosine_beyond_one_counts_as_one() -> None:
    """The square of a gradient of 1e-22 underflows to less than half of it, which leaves a cosine of 2.7."""
    M = torch.tensor([[1e-45, 1e-22, 0.0], [1e-22, 1.0, 0.0], [0.0, 0.0, 1.0]])
    method = small(lr=3e-3)
    for _ in range(150):
        alpha = method.weights(M, torch.eye(3))
    assert (alpha - torch.tensor([4.0, 4.0, 2.0]).softmax(-1)).abs().max() < 1e-2


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("T", [2, 3, 5])
def test_converges_on_hard_problems_too(T: int, problem: str) -> None:
    G = PROBLEMS[problem](T, 40)
    optimum = reference.attention_optimum(list(G), 0.5)
    method = small(lr=3e-3)
    for _ in range(150):
        alpha = method.weights(gk.gramian(G), G[:, : method.subset])
    assert (alpha - optimum).abs().max() < 1e-2


def test_different_problems_of_a_batch_converge_each_to_its_own_optimum(device: torch.device) -> None:
    """One network serves them, so it must tell them apart by their entries."""
    G = torch.stack([gradients(3, 64) for _ in range(3)]).to(device)
    optimum = (agreement(G) / 0.5).softmax(-1)
    assert (optimum[0] - optimum[1:]).abs().amax(-1).min() > 0.05
    method = small(lr=3e-3)
    for _ in range(600):
        alpha = method.weights(G @ G.mT, G)
    assert (alpha - optimum).abs().max() < 1e-2


def test_it_sees_which_task_is_against_the_others(device: torch.device) -> None:
    """At each step another one, so that only the entries tell, drawn anew each time: 1/T would be far off."""
    method = GradAttention(subset=256)
    common = torch.randn(2000, device=device)
    errors = []
    for _ in range(300):
        G = common + 0.5 * torch.randn(3, 2000, device=device)
        against = torch.randint(3, ())
        G[against] *= -1
        alpha = method.weights(G @ G.T, G[:, method.positions((2000,), G.device)])
        errors.append((alpha - (agreement(G) / 0.5).softmax(-1)).abs().max())
    assert torch.stack(errors[:5]).mean() > 0.25
    assert torch.stack(errors[-30:]).mean() < 0.05  # no gradient is seen twice: five times the bound of fixed ones


@pytest.mark.parametrize("T", [3, 5])
def test_noise_loses_its_weight(T: int, device: torch.device) -> None:
    """The last task's gradient is fresh noise at each step; the others share a direction."""
    method = GradAttention(subset=256)
    common = torch.randn(2000, device=device)
    for _ in range(150):
        G = common + 0.3 * torch.randn(T, 2000, device=device)
        G[-1] = torch.randn(2000, device=device)
        alpha = method.weights(G @ G.T, G[:, method.positions((2000,), G.device)])
    assert alpha[-1] < 0.25 / T
    assert (alpha[:-1] > 1 / T).all()


def test_leading_dimensions_are_independent_problems(device: torch.device) -> None:
    method = trained()
    G = torch.stack([gradients(3, 50) for _ in range(6)]).view(2, 3, 3, 50).to(device)
    M = G @ G.mT
    one_by_one = [[copy.deepcopy(method).weights(M[i, j], G[i, j]) for j in range(3)] for i in range(2)]
    expected = torch.stack([torch.stack(row) for row in one_by_one])
    assert (expected[0, 0] - expected[1, 1]).abs().max() > 1e-3
    # 1e-12: float64 throughout, products of another shape summed in another order.
    assert_near(method.weights(M, G), expected, 1.0, 1e-12)


def test_only_directions_count(device: torch.device) -> None:
    """Bit for bit where the scales are powers of two, in what comes out and in what is learned."""
    G = gradients(3, 64).to(device)
    scale = torch.tensor([2.0**50, 2.0**-50, 1.0], dtype=torch.float64, device=device).unsqueeze(-1)
    method = trained()
    other = copy.deepcopy(method)
    S = scale * G
    for _ in range(3):
        assert torch.equal(other.weights(scale * (G @ G.T) * scale.T, S), method.weights(G @ G.T, G))
    assert same(everything(other), everything(method))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_of_a_dtype(dtype: torch.dtype) -> None:
    """Entries at both ends of what the dtype holds: no square overflows or vanishes on the way."""
    info = torch.finfo(dtype)
    method = trained(2)
    M = torch.eye(2, dtype=dtype)
    X = torch.tensor([[1.0, -1.0, 0.5], [0.25, 1.0, 0.0]], dtype=dtype)
    expected = copy.deepcopy(method).weights(M, X)
    scaled = X * torch.tensor([[info.max], [4 * info.smallest_normal]], dtype=dtype)
    # Dividing by the end of the dtype, not by a power of two, rounds.
    assert_near(copy.deepcopy(method).weights(M, scaled), expected, 1.0, 10 * info.eps)


def test_fewer_entries_are_padded_with_zeros(device: torch.device) -> None:
    G = gradients(3, 40).to(device)
    method = trained()
    other = copy.deepcopy(method)
    padded = torch.cat((G, torch.zeros(3, 24, dtype=torch.float64, device=device)), dim=1)
    assert torch.equal(method.weights(G @ G.T, G), other.weights(G @ G.T, padded))
    assert same(everything(method), everything(other))


def saved_to_a_file(method: GradAttention) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


@pytest.mark.parametrize("saved", [GradAttention.state_dict, saved_to_a_file])
def test_a_fresh_instance_resumes_exactly(saved: Callable[[GradAttention], dict[str, Any]]) -> None:
    method = trained(generator=torch.Generator().manual_seed(1))
    fresh = small(lr=1e-2, generator=torch.Generator())
    fresh.load_state_dict(saved(method))
    assert same(everything(fresh), everything(method))
    expected = sequence(method)
    assert len({tuple(row) for row in expected.tolist()}) == 5
    assert torch.equal(sequence(fresh), expected)


def test_loading_shares_no_memory() -> None:
    method = trained()
    state = copy.deepcopy(method.state_dict())
    one, other = small(lr=1e-2), small(lr=1e-2)
    one.load_state_dict(state)
    sequence(one)
    other.load_state_dict(state)
    assert same(everything(other), everything(method))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda method: pickle.loads(pickle.dumps(method))])
def test_copies_resume_exactly(copied: Callable[[GradAttention], GradAttention]) -> None:
    method = trained(generator=torch.Generator().manual_seed(1))
    before = everything(method)
    other = copied(method)
    expected = sequence(other)
    assert same(everything(method), before)  # the copy has its own optimizer and its own generator
    assert torch.equal(sequence(method), expected)


def test_the_state_before_the_first_step_starts_over() -> None:
    method = small(generator=torch.Generator().manual_seed(1))
    start = copy.deepcopy(method.state_dict())
    expected = sequence(method)
    method.load_state_dict(start)
    assert torch.equal(sequence(method), expected)
    method.load_state_dict(start)
    assert sequence(method, T=4).shape == (5, 4)  # the number of tasks was forgotten too


@pytest.mark.parametrize("other", [{"width": 8}, {"layers": 1}, {"layers": 3}, {"subset": 32}])
def test_loading_is_all_or_nothing(other: dict[str, int]) -> None:
    method = trained()
    before = everything(method)
    with pytest.raises(RuntimeError, match=r"Error\(s\) in loading state_dict for GradAttention"):
        method.load_state_dict(trained(T=2, **other).state_dict())
    assert same(everything(method), before)


def test_a_state_that_cannot_be_loaded_is_refused() -> None:
    method = trained()
    before = everything(method)
    with pytest.raises(TypeError, match="must hold 'generator', 'tasks' and 'adam', got tensor"):
        method.load_state_dict({**method.state_dict(), "_extra_state": torch.zeros(3)})
    own = method.state_dict()["_extra_state"]
    with pytest.raises(TypeError, match="tasks must be an integer, got '3'"):
        method.load_state_dict({**method.state_dict(), "_extra_state": {**own, "tasks": "3"}})
    with pytest.raises(TypeError, match="the state of Adam must be a dict, got 3"):
        method.load_state_dict({**method.state_dict(), "_extra_state": {**own, "adam": 3}})
    with pytest.raises(ValueError, match="generator is None"):
        method.load_state_dict(trained(generator=torch.Generator()).state_dict())
    with pytest.raises(ValueError, match="assign must be False"):
        method.load_state_dict(trained().state_dict(), assign=True)
    assert same(everything(method), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["M", "X"])
def test_a_step_that_is_not_finite_leaves_everything(where: str, value: float, device: torch.device) -> None:
    method = trained()
    untouched = copy.deepcopy(method)
    before = everything(method)
    G = torch.stack([gradients(3, 64) for _ in range(2)]).to(device)
    M, X = G @ G.mT, G.clone()
    {"M": M, "X": X}[where][0, 1, 1] = value
    alpha = method.weights(M, X)
    assert alpha.isfinite().all()
    assert torch.equal(alpha[1], copy.deepcopy(untouched).weights(G @ G.mT, G)[1])  # the problem beside it
    assert same({k: v.cpu() if isinstance(v, Tensor) else v for k, v in everything(method).items()}, before)
    assert torch.equal(sequence(method), sequence(untouched))


def test_a_first_step_that_is_not_finite_counts_for_nothing() -> None:
    method, other = small(), small()
    other.load_state_dict(method.state_dict())
    assert torch.equal(method.weights(torch.full((3, 3), float("nan")), torch.ones(3, 5)), torch.full((3,), 1 / 3))
    G = gradients(3, 60)
    for _ in range(5):
        assert torch.equal(method.weights(G @ G.T, G), other.weights(G @ G.T, G))
    assert same(everything(method), everything(other))


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16, torch.float32])
def test_the_network_keeps_its_precision(to: torch.dtype) -> None:
    method = trained()
    before = everything(method)
    assert same(everything(method.to(to)), before)
    assert same(everything(torch.nn.Sequential(method).to("cpu", to)[0]), before)


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


AMBIENT = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no grad": torch.no_grad,
    "inference": torch.inference_mode,
    "matmul precision": lambda: matmul_precision("medium"),
    "default dtype": lambda: default_dtype(torch.bfloat16),
    "default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("ambient", AMBIENT)
def test_ambient_state_changes_nothing(ambient: str) -> None:
    torch.manual_seed(3)
    method = GradAttention(subset=2048)
    torch.manual_seed(3)
    G = gradients(3, 2048, torch.float32)
    M = G @ G.T
    expected = [method.weights(M, G) for _ in range(5)]
    torch.manual_seed(3)
    other = GradAttention(subset=2048)
    torch.manual_seed(3)
    with AMBIENT[ambient]():
        if ambient.startswith("default"):  # what is made there must not change either
            other = GradAttention(subset=2048)
        if ambient == "inference":  # tensors made there are such as autograd refuses to keep
            M, G = M.clone(), G.double().clone()
            assert G.is_inference()
        for alpha in expected:
            assert torch.equal(other.weights(M, G), alpha)


def test_evaluation_mode_changes_nothing() -> None:
    method = trained()
    other = copy.deepcopy(method).eval()
    assert torch.equal(sequence(other), sequence(method))


def test_the_users_random_numbers_stay_the_same() -> None:
    method = small()
    before = torch.get_rng_state()
    G = gradients(3, 64)
    torch.set_rng_state(before)
    method.weights(G @ G.T, G)
    method.weights(G @ G.T, G)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_gradient_flows() -> None:
    G = gradients(3, 64).requires_grad_()
    method = small()
    assert not method.weights(G @ G.T, G).requires_grad
    assert all(p.grad is None for p in method.parameters())


def test_compiled() -> None:
    method = trained()
    other = copy.deepcopy(method)
    G = gradients(3, 64)
    compiled = torch.compile(method.weights, backend="eager")
    for _ in range(3):
        assert torch.equal(compiled(G @ G.T, G), other.weights(G @ G.T, G))
    assert same(everything(method), everything(other))


@pytest.mark.parametrize("update", ["all", "subset"])
def test_nothing_reads_a_number(update: str) -> None:
    with FakeTensorMode():
        method = small(update=update)
        for _ in range(2):
            assert method(torch.randn(3, 500)).shape == (500,)
            assert method.weights(torch.randn(2, 3, 3), torch.randn(2, 3, 30)).shape == (2, 3)


def test_tensors_without_numbers_leave_no_trace() -> None:
    method = trained()
    before = everything(method)
    assert method(torch.empty(3, 500, device="meta")).shape == (500,)
    assert method.weights(torch.empty(0, 3, 3), torch.empty(0, 3, 9)).shape == (0, 3)
    assert same(everything(method), before)


@pytest.mark.parametrize("n", [0, 1, 5, 64, 65, 100, 12_345, 10**12])
def test_positions_are_distinct_ascending_and_in_range(n: int, device: torch.device) -> None:
    found = small().positions((n,), device)
    assert found.dtype == torch.int64
    assert found.shape == (min(n, 64),)
    assert (found.diff() > 0).all()
    assert n == 0 or (found[0] >= 0 and found[-1] < n)
    if n <= 64:
        assert found.tolist() == list(range(n))


def test_positions_are_uniform_in_each_stretch() -> None:
    """Stretches of 15 and 16 entries. The sum of (count - mean)² / mean is χ² with n - d degrees of freedom."""
    n, d, draws = 1000, 64, 4000
    method = small(generator=torch.Generator().manual_seed(5))
    counts = torch.zeros(n, dtype=torch.float64)
    for _ in range(draws):
        counts[method.positions((n,), counts.device)] += 1
    bounds = [k * n // d for k in range(d + 1)]
    mean = torch.cat([torch.full((b - a,), draws / (b - a)) for a, b in pairwise(bounds)])
    chi2 = ((counts - mean) ** 2 / mean).sum().item()
    freedom = n - d
    assert abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5  # five standard deviations


def test_the_generator_decides_the_positions() -> None:
    device = torch.device("cpu")
    one, same_seed, other = (small(generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    first = one.positions((10_000,), device)
    assert torch.equal(same_seed.positions((10_000,), device), first)
    assert not torch.equal(other.positions((10_000,), device), first)
    assert not torch.equal(one.positions((10_000,), device), first)
    with pytest.raises(ValueError, match="generator is on cpu, the gradients on meta"):
        one.positions((5,), torch.device("meta"))


@pytest.mark.parametrize("offsets", [None, [0, 100, 100, 120, 500]])
@pytest.mark.parametrize("update", ["all", "subset"])
def test_on_a_matrix(update: str, offsets: list[int] | None, device: torch.device) -> None:
    J = gradients(3, 500).to(device).requires_grad_()
    method = trained(update=update, generator=torch.Generator(device).manual_seed(9))
    other = copy.deepcopy(method)
    result = method(J, None if offsets is None else torch.tensor(offsets))
    expected, slope = torch.zeros(2, 500, dtype=torch.float64, device=device)
    bounds = offsets or [0, 500]
    problems = []
    for a, b in pairwise(bounds):
        rows = J.detach()[:, a:b]
        here = other.positions((b - a,), rows.device)
        X = rows[:, here]
        M = X @ X.T if update == "subset" else rows @ rows.T
        alpha = copy.deepcopy(other).weights(M, X)
        places = slice(a, b) if update == "all" else a + here
        expected[places] = alpha @ J.detach()[:, places]
        slope[places] = alpha[1]
        problems.append((M, torch.nn.functional.pad(X, (0, 64 - X.shape[1]))))
    assert_near(result, expected, J.abs().max(), 1e-11)  # float64, a Gramian and a network apart in their roundings
    (result.sum()).backward()
    assert_near(J.grad[1], slope, 1.0, 1e-11)
    # What it learned is what the problems, given as one batch, teach. 1e-8: Adam divides by the size of the gradient.
    other.weights(*(torch.stack(part) if offsets else part[0] for part in zip(*problems, strict=True)))
    for a, b in zip(method.parameters(), other.parameters(), strict=True):
        assert_near(a, b, 1.0, 1e-8)


@pytest.mark.parametrize("update", ["all", "subset"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(dtype: torch.dtype, update: str, device: torch.device) -> None:
    J = gradients(3, 500, dtype).to(device)
    result = small(update=update, generator=torch.Generator(device).manual_seed(9))(J)
    mean = J.double().mean(0)
    if update == "subset":
        drawn = small(generator=torch.Generator(device).manual_seed(9)).positions((500,), J.device)
        mean = torch.zeros_like(mean).index_copy(0, drawn, mean[drawn])
    assert result.dtype == dtype
    assert_near(result, mean, J.double().abs().max(), TOLERANCES[dtype])


def test_repr_is_exact() -> None:
    for text in (
        "GradAttention(subset=4096, width=64, layers=2, update='all', entropy=0.5, lr=0.001)",
        "GradAttention(subset=7, width=3, layers=1, update='subset', entropy=2.0, lr=0.25)",
    ):
        assert repr(eval(text, {"GradAttention": GradAttention})) == text
    assert "lr=0.001, generator=<torch" in repr(small(generator=torch.Generator()))


not_numbers = st.one_of(st.none(), st.booleans(), st.text("ab", max_size=3), st.lists(st.integers(), max_size=2))


@settings(max_examples=60)
@given(
    st.one_of(
        st.tuples(st.sampled_from(["subset", "width", "layers"]), st.one_of(not_numbers, st.floats())).map(
            lambda pair: (*pair, TypeError)
        ),
        st.tuples(
            st.sampled_from(["subset", "width", "layers"]),
            st.one_of(st.integers(max_value=0), st.just(10**400)),
            st.just(ValueError),
        ),
        st.tuples(st.sampled_from(["entropy", "lr"]), not_numbers, st.just(TypeError)),
        st.tuples(
            st.sampled_from(["entropy", "lr"]),
            st.one_of(
                st.floats(max_value=0.0),
                st.integers(max_value=0),
                st.sampled_from([float("nan"), float("inf"), 10**400]),
            ),
            st.just(ValueError),
        ),
        st.tuples(st.just("update"), st.one_of(st.none(), st.booleans(), st.integers()), st.just(TypeError)),
        st.tuples(st.just("update"), st.text("ab", max_size=3), st.just(ValueError)),
        st.tuples(st.just("generator"), st.integers(), st.just(TypeError)),
    )
)
def test_bad_arguments(case: tuple[str, object, type[Exception]]) -> None:
    name, value, error = case
    with pytest.raises(error) as raised:
        small(**{name: value})
    assert name in str(raised.value)
    assert shown(value) in str(raised.value)


@pytest.mark.parametrize(
    ("M", "X", "error", "message"),
    [
        (torch.eye(3), [[1.0]], TypeError, r"X must be a tensor, got \[\[1.0\]\]"),
        (torch.eye(3), torch.ones(3, 4).bfloat16(), TypeError, "X must be float32 or float64, got torch.bfloat16"),
        (torch.eye(3), torch.ones(2, 4), ValueError, r"X must have shape \(3, 'd'\) .*got \(2, 4\)"),
        (torch.eye(3), torch.ones(3, 65), ValueError, r"with d <= subset = 64, got \(3, 65\)"),
        (torch.eye(3), torch.ones(3), ValueError, "X must have shape"),
        (torch.eye(3).expand(2, 3, 3), torch.ones(3, 4), ValueError, "X must have shape"),
        (torch.eye(3), torch.ones(3, 4, device="meta"), ValueError, "X must be on M's device, cpu; got meta"),
        (torch.ones(3, 2), torch.ones(3, 4), ValueError, "M must have shape"),
        (torch.eye(2), torch.ones(2, 4), ValueError, "the network is for 3 tasks, M has 2"),
    ],
)
def test_bad_gramians_and_entries(M: Tensor, X: Any, error: type[Exception], message: str) -> None:
    method = trained()
    before = everything(method)
    with pytest.raises(error, match=message):
        method.weights(M, X)
    assert same(everything(method), before)
