"""Tests of TaskSampler on real data loaders: closed forms, binomial bounds, and resumed runs."""

import io
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import gradkern as gk
from gradkern.sampling import SCHEMES, TaskSampler

SIZES = [3, 8, 13]
LENGTHS = [2, 4, 7]  # in batches of 2
EPOCH = {"joint": 7, "round_robin": 3 * 7, "random": 2 + 4 + 7, "proportional": 2 + 4 + 7, "annealed": 2 + 4 + 7}

Step = list[list[float] | None]


def loaders(**options: Any) -> list[DataLoader]:
    """Return the loaders of three tasks. Example k of task t is the number 100 t + k."""
    options = {"batch_size": 2, "shuffle": True} | options
    return [DataLoader(TensorDataset(100 * t + torch.arange(n)), **options) for t, n in enumerate(SIZES)]


def sampler(data: Sequence[Any], scheme: str, **options: Any) -> TaskSampler:
    return TaskSampler(data, scheme, **({"epochs": 4} if scheme == "annealed" else {}), **options)


def plain(batches: list[Any]) -> Step:
    return [None if b is None else torch.as_tensor(b[0] if isinstance(b, list) else b).tolist() for b in batches]


def epochs(s: TaskSampler, n: int) -> list[Step]:
    return [plain(batches) for _ in range(n) for batches in s]


def tasks(steps: list[Step]) -> list[tuple[int, ...]]:
    return [tuple(t for t, batch in enumerate(step) if batch is not None) for step in steps]


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_epoch(scheme: str) -> None:
    s = sampler(loaders(), scheme, seed=3)
    for epoch in range(3):
        assert (s.epoch, s.step, len(s)) == (epoch, 0, EPOCH[scheme])
        steps = epochs(s, 1)
        assert len(steps) == EPOCH[scheme]
        assert all(len(step) == 3 for step in steps)
        for step in steps:
            assert all(batch is None or {x // 100 for x in batch} == {t} for t, batch in enumerate(step))
        present = tasks(steps)
        if scheme == "joint":
            assert set(present) == {(0, 1, 2)}
        elif scheme == "round_robin":
            assert present == [(k % 3,) for k in range(21)]
        else:
            assert {len(p) for p in present} == {1}


@pytest.mark.parametrize("scheme", ["joint", "round_robin"])
def test_the_longest_loader_is_passed_once_an_epoch(scheme: str) -> None:
    s = sampler(loaders(), scheme)
    for _ in range(3):
        assert sorted(x for step in epochs(s, 1) for x in step[2] or []) == list(range(200, 213))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shuffle", [False, True])
def test_recycling_favours_no_example(scheme: str, shuffle: bool) -> None:
    """Count examples: at any time, across epochs too, one has come up at most once more than another of its task."""
    s = sampler(loaders(shuffle=shuffle), scheme)
    seen = [Counter({100 * t + k: 0 for k in range(n)}) for t, n in enumerate(SIZES)]
    for step in epochs(s, 4):
        for t, batch in enumerate(step):
            seen[t].update(batch or [])
            assert max(seen[t].values()) - min(seen[t].values()) <= 1
    assert min(seen[0].values()) >= 2


def test_each_pass_is_shuffled_anew() -> None:
    data = [DataLoader(TensorDataset(torch.arange(20)), batch_size=20, shuffle=True), [0] * 50]
    passes = [tuple(step[0]) for step in epochs(TaskSampler(data), 1)]
    assert len(set(passes)) == 50  # two of 20! orders are the same once in 10^15 runs
    assert all(sorted(p) == list(range(20)) for p in passes)


def test_round_robin_goes_on_where_the_epoch_before_ended() -> None:
    s = sampler(loaders(), "round_robin", steps=4)
    assert [p[0] for p in tasks(epochs(s, 3))] == [0, 1, 2] * 4


@given(
    n_batches=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    scheme=st.sampled_from(SCHEMES),
    steps=st.none() | st.integers(1, 12),
    seed=st.integers(0, 2**63 - 1),
    cut=st.integers(0, 60),
)
@settings(max_examples=60)
def test_every_task_goes_through_its_batches_in_turn(
    n_batches: list[int], scheme: str, steps: int | None, seed: int, cut: int
) -> None:
    """Use loaders that do not shuffle: each task repeats its list of batches, through a resumed run too."""
    data = [[10 * t + k for k in range(n)] for t, n in enumerate(n_batches)]
    options = {"steps": steps, "seed": seed, "sizes": n_batches}
    whole = epochs(sampler(data, scheme, **options), 3)
    for t, batches in enumerate(data):
        came = [step[t] for step in whole if step[t] is not None]
        assert came == list(itertools.islice(itertools.cycle(batches), len(came)))
    first = sampler(data, scheme, **options)
    cut = min(cut, len(whole))
    forever = (batches for _ in range(4) for batches in first)
    assert [plain(next(forever)) for _ in range(cut)] == whole[:cut]
    second = sampler(data, scheme, **options)
    second.load_state_dict(saved_and_loaded(first.state_dict()))
    assert epochs(second, 3 - second.epoch) == whole[cut:]


def annealed(epoch: int) -> list[float]:
    """Return exactly p_i ∝ N_i^α of epoch 1 … 4 of 4, with α written out: 1, 1 - 0.8/3, 1 - 1.6/3, 0.2."""
    alpha = [1.0, 2.2 / 3, 1.4 / 3, 0.2][epoch - 1]
    return [n**alpha / sum(m**alpha for m in SIZES) for n in SIZES]


SHARES: list[tuple[str, Callable[[int], list[float]]]] = [
    ("random", lambda epoch: [1 / 3] * 3),
    ("proportional", lambda epoch: [3 / 24, 8 / 24, 13 / 24]),
    ("annealed", annealed),
]


@pytest.mark.parametrize(("scheme", "share"), SHARES)
def test_frequencies(scheme: str, share: Callable[[int], list[float]]) -> None:
    """Check binomial counts: each task's is within five standard deviations, except once in two million times."""
    n = 8000
    s = sampler([[0], [0], [0]], scheme, steps=n, sizes=SIZES)
    for epoch in range(1, 5):
        came = Counter(p[0] for p in tasks(epochs(s, 1)))
        for t, p in enumerate(share(epoch)):
            assert abs(came[t] - n * p) <= 5 * (n * p * (1 - p)) ** 0.5


@pytest.mark.parametrize(("scheme", "share"), SHARES)
def test_probabilities_in_closed_form(
    scheme: str, share: Callable[[int], list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn_from = []
    multinomial = torch.multinomial

    def spy(p: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        drawn_from.append(p / p.sum())
        return multinomial(p, *args, **kwargs)

    monkeypatch.setattr(torch, "multinomial", spy)
    epochs(sampler(loaders(), scheme), 4)
    expected = torch.tensor([share(epoch) for epoch in range(1, 5)], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(drawn_from), expected, rtol=1e-14, atol=0)  # powers, with a few roundings


def test_one_annealed_epoch_is_proportional() -> None:
    one = epochs(TaskSampler(loaders(), "annealed", epochs=1, seed=5), 1)
    assert one == epochs(TaskSampler(loaders(), "proportional", seed=5), 1)


def test_annealed_ends_with_its_last_epoch() -> None:
    s = TaskSampler(loaders(), "annealed", epochs=2)
    epochs(s, 2)
    with pytest.raises(ValueError, match="epochs=2 are finished; scheme='annealed' has no epoch 3"):
        next(iter(s))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_seed_decides(scheme: str) -> None:
    torch.manual_seed(1)
    one = epochs(sampler(loaders(), scheme, seed=7), 2)
    torch.manual_seed(2)
    assert epochs(sampler(loaders(), scheme, seed=7), 2) == one
    other = epochs(sampler(loaders(), scheme, seed=8), 2)
    assert other != one
    assert (tasks(other) == tasks(one)) == (scheme in ("joint", "round_robin"))


class Noisy(Dataset):
    """Dataset that adds noise from torch's default generator to its examples."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, k: int) -> float:
        return k + torch.rand((), dtype=torch.float64).item()


def noisy() -> list[DataLoader]:
    return [DataLoader(Noisy(n), batch_size=2, shuffle=True) for n in SIZES]


def test_noise_does_not_repeat() -> None:
    noise = [x % 1 for step in epochs(sampler(noisy(), "joint"), 2) for batch in step for x in batch]
    assert len(set(noise)) == len(noise)


def own_generators() -> list[DataLoader]:
    """Return loaders with a generator in each possible place. The third's is drawn from during the whole pass."""
    generators = [torch.Generator().manual_seed(k) for k in range(4)]
    data = [TensorDataset(100 * t + torch.arange(n)) for t, n in enumerate([3, 8, 70, 13])]
    lazy = RandomSampler(data[2], replacement=True, generator=generators[2])  # 32 numbers at a time
    grouped = BatchSampler(RandomSampler(data[3], generator=generators[3]), 2, drop_last=True)
    return [
        DataLoader(data[0], batch_size=2, shuffle=True, generator=generators[0]),
        DataLoader(data[1], batch_size=2, sampler=WeightedRandomSampler([1.0] * 8, 8, generator=generators[1])),
        DataLoader(data[2], batch_size=7, sampler=lazy),
        DataLoader(data[3], batch_sampler=grouped),
    ]


def one_generator() -> list[DataLoader]:
    return loaders(generator=torch.Generator().manual_seed(5))


def default_generator() -> list[DataLoader]:
    return loaders(generator=torch.default_generator)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("data", [loaders, noisy, own_generators, one_generator, default_generator])
def test_resumed_at_every_step(scheme: str, data: Callable[[], list[DataLoader]]) -> None:
    """Resume after any step: a fresh sampler gives exactly the batches that would have come.

    The default generator is in another state.
    """
    s = sampler(data(), scheme, seed=11)
    states, steps = [s.state_dict()], []
    for _ in range(2):
        for batches in s:
            states.append(s.state_dict())
            steps.append(plain(batches))
    for taken, state in enumerate(states):
        torch.rand(3)
        fresh = sampler(data(), scheme, seed=11)
        fresh.load_state_dict(saved_and_loaded(state))
        assert (fresh.epoch, fresh.step) == (state["epoch"], state["step"])
        assert epochs(fresh, 2 - fresh.epoch) == steps[taken:]
        if taken % 5 == 0:  # and it leads to the same place
            assert repr(fresh.state_dict()) == repr(s.state_dict())


def test_a_state_loads_into_a_sampler_that_has_run() -> None:
    s = sampler(own_generators(), "proportional")
    assert len(list(itertools.islice(s, 9))) == 9
    state = s.state_dict()
    expected = epochs(s, 2)
    running = iter(s)
    next(running)
    s.load_state_dict(state)
    assert [plain(next(running)) for _ in range(5)] == expected[:5]  # a running loop continues from there
    assert epochs(s, 2) == expected[5:]


def test_a_loop_that_was_left_goes_on() -> None:
    whole = epochs(sampler(loaders(), "random"), 1)
    s = sampler(loaders(), "random")
    first = [plain(batches) for batches in itertools.islice(s, 5)]
    assert (s.epoch, s.step) == (0, 5)
    assert first + epochs(s, 1) == whole


def test_an_epoch_is_finished_when_its_loop_is() -> None:
    """Take the state in an epoch's last step: a loop's work after the epoch is still done, and done once."""
    s = sampler(loaders(), "joint")
    state = None
    for _ in s:
        assert s.epoch == 0
        state = s.state_dict()
    assert s.epoch == 1
    resumed = sampler(loaders(), "joint")
    resumed.load_state_dict(state)
    after_epoch = []
    for epoch in range(resumed.epoch, 3):
        steps = len(list(resumed))
        after_epoch.append((epoch, steps))
    assert after_epoch == [(0, 0), (1, 7), (2, 7)]


def with_workers(generator: bool, **options: Any) -> list[DataLoader]:
    """Return loaders of five single examples, recycled beside a loader of twelve batches."""
    own = torch.Generator().manual_seed(3) if generator else None
    small = DataLoader(TensorDataset(torch.arange(5)), shuffle=True, generator=own, **options)
    return [small, DataLoader(TensorDataset(torch.arange(12)), shuffle=True)]


@pytest.mark.parametrize("generator", [False, True])
def test_workers_change_nothing(generator: bool) -> None:
    without = epochs(TaskSampler(with_workers(generator)), 1)
    assert epochs(TaskSampler(with_workers(generator, num_workers=2)), 1) == without


def test_begun_without_workers_and_resumed_with_them() -> None:
    s = TaskSampler(with_workers(generator=False))
    assert len(list(itertools.islice(s, 7))) == 7
    resumed = TaskSampler(with_workers(generator=False, num_workers=2))
    resumed.load_state_dict(s.state_dict())
    assert epochs(resumed, 1) == epochs(s, 1)


@pytest.mark.parametrize("generator", [False, True])
@pytest.mark.parametrize("persistent_workers", [False, True])
def test_resumed_with_workers(generator: bool, persistent_workers: bool) -> None:
    options = {"num_workers": 2, "persistent_workers": persistent_workers}
    s = TaskSampler(with_workers(generator, **options))
    states, steps = [], []
    for batches in s:
        states.append(s.state_dict())
        steps.append(plain(batches))
    for taken in (2, 7):  # in the first pass of the small loader, and in the second
        fresh = TaskSampler(with_workers(generator, **options))
        fresh.load_state_dict(states[taken])
        assert epochs(fresh, 1) == steps[taken + 1 :]


@pytest.mark.parametrize("data", [loaders, noisy, own_generators, default_generator])
def test_the_default_generators_are_left_alone(
    data: Callable[[], list[DataLoader]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def seeded(*args: Any) -> None:
        raise AssertionError("the GPUs' default generators are seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded)
    before = torch.get_rng_state()
    s = sampler(data(), "annealed")
    for _ in s:
        assert torch.equal(torch.get_rng_state(), before)
    state = s.state_dict()
    torch.rand(3)
    before = torch.get_rng_state()
    fresh = sampler(data(), "annealed")
    fresh.load_state_dict(state)
    next(iter(fresh))
    assert torch.equal(torch.get_rng_state(), before)


OTHERS: list[tuple[Callable[[], TaskSampler], str]] = [
    (lambda: sampler(loaders()[:2], "annealed"), r"lengths = \[2, 4\], this sampler has \[2, 4, 7\]"),
    (lambda: sampler(loaders(batch_size=3), "annealed"), r"lengths = \[1, 3, 5\]"),
    (lambda: TaskSampler(loaders(), "proportional"), "scheme = 'proportional', this sampler has 'annealed'"),
    (lambda: sampler(loaders(), "annealed", seed=1), "seed = 1, this sampler has 0"),
    (lambda: sampler(loaders(), "annealed", steps=5), "steps = 5, this sampler has 13"),
    (lambda: sampler(loaders(), "annealed", sizes=[3, 8, 14]), r"sizes = \[3, 8, 14\], this sampler has \[3, 8, 13\]"),
    (lambda: TaskSampler(loaders(), "annealed", epochs=5), "epochs = 5, this sampler has 4"),
    (lambda: sampler(one_generator(), "annealed"), r"generators = \[1, 1, 1\], this sampler has \[0, 0, 0\]"),
]


@pytest.mark.parametrize(("other", "message"), OTHERS)
def test_a_state_of_another_sampler(other: Callable[[], TaskSampler], message: str) -> None:
    s = sampler(loaders(), "annealed")
    expected = epochs(sampler(loaders(), "annealed"), 1)
    first = [plain(batches) for batches in itertools.islice(s, 4)]
    with pytest.raises(ValueError, match=f"state_dict has {message}"):
        s.load_state_dict(other().state_dict())
    assert first + epochs(s, 1) == expected


@pytest.mark.parametrize("state", [{}, {"epoch": 1}, 3, None])
def test_what_is_no_state(state: Any) -> None:
    s = sampler(loaders(), "joint")
    with pytest.raises(ValueError, match=r"state_dict must hold \['lengths', .*got "):
        s.load_state_dict(state)
    assert (s.epoch, s.step) == (0, 0)


class Stream(IterableDataset):
    """Iterable dataset of ``n`` examples, without a length."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.n))


class Promising:
    """Loader that gives fewer batches than its length."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.n))


def test_loaders_that_give_less_than_their_length() -> None:
    assert epochs(TaskSampler([Promising(2)]), 2) == [[0], [1], [0], [1], [0], [1]]
    with pytest.raises(ValueError, match=r"loaders\[1\] has a length, but gave no batch"):
        list(TaskSampler([[0], Promising(0)]))
    full = TaskSampler([Promising(3)])
    assert epochs(full, 1) == [[0], [1], [2]]
    short = TaskSampler([Promising(1)])
    with pytest.raises(ValueError, match=r"loaders\[0\] ends before its batch 3, which state_dict has seen"):
        short.load_state_dict(full.state_dict())
    assert short.epoch == 0
    assert epochs(short, 1) == [[0], [0], [0]]


ONE = loaders()[0]

BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: TaskSampler(ONE), TypeError, "loaders must be a sequence of data loaders.*got <.*DataLoader"),
    (lambda: TaskSampler("ab"), TypeError, "loaders must be a sequence.*got '"),
    (lambda: TaskSampler([]), ValueError, "loaders is empty"),
    (lambda: TaskSampler([ONE, 3]), TypeError, r"loaders\[1\] must be a data loader.*got int"),
    (lambda: TaskSampler([ONE, iter([3])]), TypeError, r"loaders\[1\] .*again and again, got list_iterator"),
    (lambda: TaskSampler([DataLoader(Stream(4))]), TypeError, r"loaders\[0\] must have a length, got DataLoader"),
    (lambda: TaskSampler([ONE, []]), ValueError, r"loaders\[1\] has no batches"),
    (
        lambda: TaskSampler([ONE, DataLoader(TensorDataset(torch.ones(3)), batch_size=4, drop_last=True)]),
        ValueError,
        r"loaders\[1\] has no batches",
    ),
    (lambda: TaskSampler([ONE, [0], ONE]), ValueError, r"loaders\[0\] and loaders\[2\] are one object"),
    (lambda: TaskSampler([ONE], "anneal"), ValueError, "scheme must be one of 'joint'.*got 'anneal'"),
    (lambda: TaskSampler([ONE], ["joint"]), ValueError, r"scheme must be .*got \['joint'\]"),
    (lambda: TaskSampler([ONE], "annealed"), ValueError, "epochs must be given for scheme='annealed', got None"),
    (lambda: TaskSampler([ONE], "annealed", epochs=0), ValueError, "epochs must be an integer from 1 to .*got 0"),
    (lambda: TaskSampler([ONE], epochs=2.0), TypeError, "epochs must be an integer, got 2.0"),
    (lambda: TaskSampler([ONE], steps=0), ValueError, "steps must be an integer from 1 to .*got 0"),
    (lambda: TaskSampler([ONE], steps=True), TypeError, "steps must be an integer, got True"),
    (lambda: TaskSampler([ONE], seed=-1), ValueError, "seed must be an integer from 0 to .*got -1"),
    (lambda: TaskSampler([ONE], seed=None), TypeError, "seed must be an integer, got None"),
    (lambda: TaskSampler([ONE], sizes=3), TypeError, "sizes must be a sequence of integers.*got 3"),
    (lambda: TaskSampler([ONE], sizes=[]), ValueError, r"sizes has 0 entries for 1 loaders: \[\]"),
    (lambda: TaskSampler([ONE], sizes=[1, 2]), ValueError, r"sizes has 2 entries for 1 loaders: \[1, 2\]"),
    (lambda: TaskSampler([ONE], sizes=[0]), ValueError, r"sizes\[0\] must be an integer from 1 to .*got 0"),
    (lambda: TaskSampler([ONE], sizes=[2**63]), ValueError, r"sizes\[0\] must be .* to 2\*\*63 - 1, got 92233"),
    (lambda: TaskSampler([ONE], sizes=[0.5]), TypeError, r"sizes\[0\] must be an integer, got 0.5"),
    (lambda: TaskSampler([ONE, [0]], "proportional"), ValueError, r"sizes is None, and loaders\[1\] .*give sizes"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_arguments(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.floats(),
    st.integers(-3, 3),
    st.text(max_size=3),
    st.binary(max_size=2),
    st.lists(st.integers(-1, 2) | st.none() | st.floats(), max_size=3),
    st.sampled_from([torch.ones(2), torch.ones(()), object(), len, {}, {1: 2}, ONE, iter([])]),
)


@given(name=st.sampled_from(["loaders", "scheme", "epochs", "steps", "sizes", "seed"]), value=JUNK)
@settings(max_examples=300)
def test_any_argument_is_taken_or_named(name: str, value: Any) -> None:
    arguments = {"loaders": [ONE, [0, 0]], "scheme": "annealed", "epochs": 2, "sizes": [3, 2]} | {name: value}
    message = None
    try:
        s = TaskSampler(**arguments)
    except (TypeError, ValueError) as error:
        message = str(error)
    assert len(list(s)) == len(s) if message is None else message.startswith(name)


def test_repr_is_exact() -> None:
    data = loaders()
    for text in (
        "TaskSampler(loaders, scheme='joint', epochs=None, steps=None, sizes=None, seed=0)",
        "TaskSampler(loaders, scheme='annealed', epochs=4, steps=9, sizes=[3, 1, 2], seed=5)",
    ):
        assert repr(eval(text, {"TaskSampler": TaskSampler, "loaders": data})) == text


def test_training_with_absent_tasks() -> None:
    """Run the docstring's loop: heads of absent tasks do not change, and all tasks learn in the end."""
    x = torch.randn(24, 5)
    targets = [x @ torch.randn(5, 1) for _ in SIZES]
    data = [
        DataLoader(TensorDataset(x[:n], y[:n]), batch_size=4, shuffle=True) for n, y in zip(SIZES, targets, strict=True)
    ]
    trunk, heads = nn.Linear(5, 8), nn.ModuleList(nn.Linear(8, 1) for _ in SIZES)
    model = nn.ModuleList([trunk, heads])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)

    def loss(t: int, batch: Sequence[torch.Tensor]) -> torch.Tensor:
        return nn.functional.mse_loss(heads[t](trunk(batch[0])), batch[1])

    def total() -> list[float]:
        return [float(loss(t, (x[:n], y[:n])).detach()) for t, (n, y) in enumerate(zip(SIZES, targets, strict=True))]

    before = total()
    s = TaskSampler(data, "annealed", epochs=10)
    for _ in range(s.epoch, 10):
        for batches in s:
            optimizer.zero_grad()
            info = gk.backward(
                [None if b is None else loss(t, b) for t, b in enumerate(batches)], model, aggregator=gk.PCGrad()
            )
            optimizer.step()
            absent = [b is None for b in batches]
            assert info.losses.isnan().tolist() == absent
            assert [head.weight.grad is None for head in heads] == absent
    assert all(after < b / 2 for after, b in zip(total(), before, strict=True))


class EndsEarly(DataLoader):
    """Shuffled loader with a length of 3 that gives fewer batches."""

    def __init__(self, batches: int, generator: torch.Generator) -> None:
        super().__init__(TensorDataset(torch.arange(3)), shuffle=True, generator=generator)
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(super().__iter__(), self.batches)


def test_a_replay_that_fails_leaves_the_loaders_generators() -> None:
    full = TaskSampler([EndsEarly(3, torch.Generator().manual_seed(1))])
    epochs(full, 1)
    generator = torch.Generator().manual_seed(2)
    short = TaskSampler([EndsEarly(1, generator)])
    before = generator.get_state()
    with pytest.raises(ValueError, match="ends before its batch"):
        short.load_state_dict(full.state_dict())
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"epoch": -5}, ValueError, "epoch must be an integer from 0"),
        ({"step": 10**9}, ValueError, "step must be at most"),
        ({"step": 1.5}, TypeError, "step must be an integer, got 1.5"),
        ({"passes": [1]}, ValueError, "passes must be a list with one entry per task"),
        ({"taken": 3}, ValueError, "taken must be a list with one entry per task, got 3"),
        ({"taken": [0, 0, "x", 0]}, TypeError, "taken must be an integer, got 'x'"),
    ],
)
def test_a_state_out_of_range_names_itself(change: dict[str, Any], error: type[Exception], message: str) -> None:
    s = sampler(own_generators(), "joint")
    epochs(s, 1)
    state = s.state_dict() | change
    with pytest.raises(error, match=message):
        s.load_state_dict(state)
    assert s.epoch == 1
