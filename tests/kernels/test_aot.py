"""The rules that machine code must keep, on builds for GPUs that need not be here. See ``aot.py``."""

from typing import Any

import pytest

from tests.kernels.builds import BUILDS

pytest.importorskip("triton", reason="no Triton on this platform")


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    """Return the reports of the builds."""
    return BUILDS.reports()


def name(report: dict[str, Any]) -> str:
    return " ".join(report[k] for k in ("kernel", "dtype", "setting", "source", "arch"))


def test_everything_compiles_for_every_target(reports: list[dict[str, Any]]) -> None:
    kernels = {"gramian", "combine", "project", "reduce", "gather", "scatter", "pcgrad", "gradvac", "adamw"}
    kernels |= {"graddrop", "trimmed_mean", "active_set", "fair", "jacobi"}
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
        alone = set() if arch == "gfx942" else {"surgery"}  # which needs stores that a barrier waits for
        assert {r["kernel"] for r in reports if r["arch"] == arch} == kernels | alone


def test_rows_are_streamed_in_128_bit_loads(reports: list[dict[str, Any]]) -> None:
    streams = [r for r in reports if r["streams"]]
    assert not [name(r) for r in streams if not any(loop["wide"] for loop in r["loops"])]


def test_both_passes_of_the_one_launch_are_streamed(reports: list[dict[str, Any]]) -> None:
    whole = [r for r in reports if r["kernel"] == "surgery"]
    assert not [name(r) for r in whole if sum(loop["wide"] > 0 for loop in r["loops"]) < 2]


def test_no_streaming_loop_spills(reports: list[dict[str, Any]]) -> None:
    assert not [name(r) for r in reports if any(loop["local"] for loop in r["loops"])]


def test_programs_on_gramians_fuse_nothing(reports: list[dict[str, Any]]) -> None:
    """Comparisons of rows that coincide depend on the last bit. Kernels that stream rows gain from fusing."""
    apart = {"pcgrad", "gradvac", "reduce", "surgery", "active_set", "jacobi"}  # "fair" has fused powers
    of_nvidia = [r for r in reports if "fused" in r]
    assert not [name(r) for r in of_nvidia if r["kernel"] in apart and r["fused"]]
    assert {r["kernel"] for r in of_nvidia if r["fused"]} >= {"gramian", "combine", "project", "adamw"}


def test_shared_memory_fits(reports: list[dict[str, Any]]) -> None:
    """A workgroup of gfx942 has 64 KB, and NVIDIA's blocks have more than twice that."""
    assert not [name(r) for r in reports if r["shared"] > 64 * 1024]
