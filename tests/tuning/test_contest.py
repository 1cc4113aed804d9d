"""Tests of the decision between candidates, with times that a clock of ours tells."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from gradkern.kernels.served import Key
from gradkern.kernels.settings import Sizes
from gradkern.tuning import clock, tune
from gradkern.tuning.contest import FEWEST, LEAST, MOST, contest, is_faster, noise
from gradkern.tuning.sizes import longest_run

CPU = torch.device("cpu")


class Turn:
    """A setting that knows whether it is in use."""

    def __init__(self, name: str, seen: list[str]) -> None:
        self.name, self.seen = name, seen

    def __enter__(self) -> None:
        self.seen.append(self.name)

    def __exit__(self, *error: object) -> None:
        self.seen.append("")


def won_by(times: dict[str, Sequence[float]], monkeypatch: pytest.MonkeyPatch, seconds: float = 1e9) -> Any:
    """Let a contest run with the given times in turn; "copy" has no setting, and the first candidate runs twice."""
    seen: list[str] = [""]
    series = {name: endless(of_name) for name, of_name in times.items()}
    monkeypatch.setattr(clock, "timed", lambda run, calls, device, ahead: next(series[seen[-1] or "copy"]))
    names = [name for name in times if name != "copy"]
    return contest([Turn(name, seen) for name in names], lambda: None, lambda: None, seconds, CPU), names, seen


def endless(times: Sequence[float]) -> Iterator[float]:
    while True:
        yield from times


def test_the_fastest_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    won, names, _ = won_by({"written": [4.0], "a": [3.0], "b": [2.0], "copy": [1.0]}, monkeypatch)
    assert names[won.winner] == "b"
    assert (won.seconds, won.first, won.copy) == (2.0, 4.0, 1.0)


@pytest.mark.parametrize(("gain", "wins"), [(LEAST / 2, False), (2 * LEAST, True)])
def test_a_gain_below_the_least_noise_is_none(gain: float, wins: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    won, names, _ = won_by({"written": [1.0], "a": [1 - gain], "copy": [1.0]}, monkeypatch)
    assert (names[won.winner] == "a") == wins
    assert won.seconds == (1 - gain if wins else 1.0)


def test_a_gain_below_the_noise_of_the_written_setting_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its two times of a round are 20 % apart, so 10 % tell nothing, and half of the time does."""
    uneven = [1.0, 1.0, 1.2]  # the first is the estimate
    for time, name in ((0.99, "written"), (0.5, "a")):
        won, names, _ = won_by({"written": uneven[1:], "a": [time], "copy": [1.0]}, monkeypatch)
        assert names[won.winner] == name


def test_noise_leaves_out_one_round_of_five() -> None:
    assert noise([1.0] * 5, [1.0, 1.0, 1.0, 1.0, 9.0]) == LEAST
    assert noise([1.0] * 5, [1.0, 1.0, 1.0, 1.5, 9.0]) == pytest.approx(0.5)
    assert not is_faster([0.9] * 5, [1.0] * 5, [1.0, 1.0, 1.0, 1.5, 9.0])
    assert is_faster([0.3] * 5, [1.0] * 5, [1.0, 1.0, 1.0, 1.5, 9.0])


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, FEWEST), (-1.0, FEWEST), (1e9, MOST)])
def test_candidates_take_turns_in_each_round(seconds: float, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, seen = won_by({"written": [1.0], "a": [1.0], "copy": [1.0]}, monkeypatch, seconds)
    assert [name for name in seen if name] == (1 + rounds) * ["written", "a", "written"]


@pytest.mark.parametrize(
    ("wins", "run"),
    [
        ("", Sizes(0, 0)),
        ("0000", Sizes(0, 0)),
        ("1000", Sizes(10, 11)),
        ("0110", Sizes(20, 31)),
        ("1011", Sizes(30, 41)),
        ("1101", Sizes(10, 21)),
        ("1111", Sizes(10, 41)),
        ("0101", Sizes(20, 21)),
    ],
)
def test_one_launch_gets_the_longest_run_of_lengths(wins: str, run: Sizes) -> None:
    assert longest_run([10, 20, 30, 40][: len(wins)], [won == "1" for won in wins]) == run


def test_a_key_is_begun_only_if_a_check_as_long_as_the_last_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks of one kernel take 30 s, and 2 s once it is compiled; those of the other take 1 s."""
    clock_says, checks = [0.0], {"chunks": iter([30.0, 2.0, 2.0]), "columns": iter([1.0] * 9)}

    def check(key: Key, device: torch.device, findings: tune.Findings) -> list[Any]:
        clock_says[0] += next(checks[key.kernel])
        return []

    monkeypatch.setattr(tune.time, "monotonic", lambda: clock_says[0])
    monkeypatch.setattr(tune, "_right", check)
    keys = [Key(kernel, rows, 4) for rows in (3, 8) for kernel in ("chunks", "columns")]
    begun: list[str] = []
    for seconds, unreached in ((100, []), (60.5, keys[2:3]), (10, keys[1:])):
        clock_says[0], checks["chunks"] = 0.0, iter([30.0, 2.0])
        assert tune.tuned(keys, "cpu", CPU, seconds, begun.append).unreached == unreached
    assert len(begun) == 4 + 3 + 1
