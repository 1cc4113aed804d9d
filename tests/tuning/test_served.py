"""Tests of the classes of launches that share a setting, and of what a launch costs after the first."""

import pytest
import torch

import gradkern as gk
from gradkern.kernels.launch import Launch
from gradkern.kernels.served import Key, served
from gradkern.kernels.settings import DOT_T, DotSetting, GramianSetting
from gradkern.ops.devices import CPU, GPU
from gradkern.ops.layout import TILE
from gradkern.ops.tables.candidates import candidates, keys
from gradkern.tuning.forced import Forced
from tests import interpreter

COUNTS = range(1, DOT_T + 1)


def of_class(key: Key) -> list[int]:
    """Return the T of a key, up to the most rows of a launch."""
    return [T for T in COUNTS if served.key(key.kernel, T, key.itemsize) == key]


def test_a_setting_serves_the_rows_up_to_its_own() -> None:
    assert [served.key("gramian", T, 4).rows for T in (1, 2, 3, 4, 5, 8, 9, 12, 13, 16, 17, 32, 33, 64, 999)] == [
        *(2, 2, 3, 4, 8, 8, 12, 12, 16, 16, 32, 32, 40, 40, 40)
    ]


@pytest.mark.parametrize("kernel", served.tunable)
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_written_settings_do_not_change_within_a_class(kernel: str, itemsize: int) -> None:
    """A table's choice takes the place of one default setting."""
    written = served.tunable[kernel].default
    for T in COUNTS:
        assert written(T, itemsize) == written(served.key(kernel, T, itemsize).rows, itemsize)


def test_candidates_hold_all_rows_of_their_class() -> None:
    for key in keys(GPU):
        counts = of_class(key)
        assert counts
        for setting in candidates(key):
            if isinstance(setting, DotSetting):
                assert counts[-1] <= setting.ROWS
                assert setting.CHAIN % setting.BLOCK == TILE % setting.CHAIN == 0
            elif isinstance(setting, GramianSetting):
                assert counts[-1] <= 12
                assert setting.V * key.itemsize == 16
                assert TILE % setting.BLOCK == 0
            elif key.kernel in ("combine", "adamw", "project"):
                assert TILE % setting.BLOCK == 0
                assert setting.BLOCK * key.itemsize >= 16 * setting.threads


@interpreter.interpreted
def test_a_later_launch_asks_for_no_table(triton_serves_the_cpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    J, w = torch.ones(3, 5), torch.ones(3)
    gk.combine(J, w)
    monkeypatch.setattr(served, "table", lambda device: pytest.fail("it asks"))
    assert gk.combine(J, w).tolist() == [3.0] * 5


@interpreter.interpreted
def test_settings_are_forced_within_a_block_alone(
    triton_serves_the_cpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    monkeypatch.setattr(Launch, "run", lambda launch, device: threads.append(launch.threads))
    key = served.key("combine", 3, 4)
    written, *_, other = candidates(key)
    forced = Forced({key: other})
    gk.combine(torch.ones(3, 5), torch.ones(3))
    for _ in range(2):
        with forced:
            gk.combine(torch.ones(3, 5), torch.ones(3))
        gk.combine(torch.ones(3, 5), torch.ones(3))
    assert written.threads != other.threads
    assert threads == [written.threads, *2 * [other.threads, written.threads]]
    assert served["combine", 3, 4, CPU] == written
