"""NVIDIA's tools, for which stand-ins print: which command is called, and how its output is read."""

import json
import os
import sys
from pathlib import Path

import pytest

from bench.first_contact import machine, ncu, sanitizer, tools
from bench.first_contact.child import SKIP

PROGRAM = ["python", "-m", "some.program"]

CLEAN = {
    "memcheck": "========= ERROR SUMMARY: 0 errors",
    "racecheck": "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
    "initcheck": "========= ERROR SUMMARY: 0 errors",
}

NCU = """\
==PROF== Connected to process 12
a line of the program
==PROF== Disconnected from process 12
"ID","Process ID","Process Name","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","12","python","combine_kernel","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","91.5"
"0","12","python","combine_kernel","launch__registers_per_thread","register/thread","122"
"1","12","python","combine_kernel","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","62.1"
"""


class StandIn:
    """A tool of a name, first on PATH, that prints given lines by the value of its second argument."""

    def __init__(self, folder: Path, name: str, outputs: dict[str, tuple[int, str]]) -> None:
        self.log = folder / f"{name}.log"
        code = f"""#!{sys.executable}
import json, os, sys
with open({str(self.log)!r}, "a") as log:
    log.write(json.dumps([sys.argv[1:], os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING")]) + "\\n")
outputs = {outputs!r}
code, text = outputs.get(sys.argv[2], outputs.get(""))
print(text)
sys.exit(code)
"""
        (folder / name).write_text(code)
        (folder / name).chmod(0o755)

    @property
    def calls(self) -> list[tuple[list[str], str | None]]:
        """The arguments of each call, and whether PyTorch's cache is off in it."""
        return [(arguments, cache) for arguments, cache in map(json.loads, self.log.read_text().splitlines())]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is first on PATH, and the only place of tools."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(tools, "PLACES", ())
    return folder


def test_tools_are_found_on_path_and_in_cudas_places(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tools.found("ncu") is None
    for version in ("12.8", "13.0"):
        folder = place.parent / f"cuda-{version}" / "bin"
        folder.mkdir(parents=True)
        StandIn(folder, "ncu", {})
    monkeypatch.setattr(tools, "PLACES", (f"{place.parent}/cuda*/bin",))
    assert tools.found("ncu") == str(place.parent / "cuda-13.0" / "bin" / "ncu")
    monkeypatch.setenv("CUDA_HOME", str(place.parent / "cuda-12.8"))
    assert tools.found("ncu") == str(place.parent / "cuda-12.8" / "bin" / "ncu")
    StandIn(place, "ncu", {})
    assert tools.found("ncu") == str(place / "ncu")


def test_each_check_is_called_on_the_program(place: Path, tmp_path: Path) -> None:
    tool = StandIn(place, sanitizer.TOOL, {check: (0, text) for check, text in CLEAN.items()})
    results = sanitizer.checked(str(place / sanitizer.TOOL), PROGRAM, tmp_path / "tools.txt")
    assert [result.check for result in results] == list(CLEAN)
    assert all(result.clean for result in results)
    options = ["--error-exitcode", "99", "--print-limit", "20"]
    assert sorted(tool.calls) == sorted((["--tool", check, *options, *PROGRAM], "1") for check in CLEAN)
    text = (tmp_path / "tools.txt").read_text()
    assert all(line in text for line in CLEAN.values())


@pytest.mark.parametrize(
    ("code", "output", "summary"),
    [
        (99, "========= Invalid read\n========= ERROR SUMMARY: 3 errors", "ERROR SUMMARY: 3 errors"),
        (0, "Internal error\n", "no summary: Internal error"),  # it checked nothing
        (1, "", "no summary: no output"),
        (1, "wrong result\n========= ERROR SUMMARY: 0 errors", "ERROR SUMMARY: 0 errors"),  # the program's own
    ],
)
def test_a_check_is_clean_only_with_a_summary_and_a_program_that_passes(code: int, output: str, summary: str) -> None:
    assert sanitizer.result("memcheck", code, output) == ("memcheck", False, summary)


def test_one_check_that_finds_something_fails_the_step(place: Path, tmp_path: Path) -> None:
    races = "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"
    outputs = {check: (0, text) for check, text in CLEAN.items()} | {"racecheck": (99, races)}
    StandIn(place, sanitizer.TOOL, outputs)
    results = sanitizer.checked(str(place / sanitizer.TOOL), PROGRAM, tmp_path / "tools.txt")
    assert [result.clean for result in results] == [True, False, True]
    assert str(results[1]).startswith("racecheck: FOUND: RACECHECK SUMMARY: 1 hazard")


def test_ncu_is_called_with_the_metrics_and_its_table_is_read(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = StandIn(place, ncu.TOOL, {"": (0, NCU)})
    (tmp_path / "tools.txt").write_text("before\n")
    assert ncu.measured(str(place / ncu.TOOL), PROGRAM, tmp_path / "tools.txt") == 0
    ((arguments, _),) = tool.calls
    assert arguments[-3:] == PROGRAM
    assert arguments[arguments.index("--metrics") + 1].split(",") == list(ncu.METRICS)
    assert arguments[arguments.index("--kernel-name") + 1] == "regex:combine"
    lines = ["0 combine_kernel: memory, % of peak: 91.5, registers: 122 register/thread"]
    lines += ["1 combine_kernel: memory, % of peak: 62.1"]
    assert (tmp_path / "tools.txt").read_text().splitlines() == ["before", "== ncu", *lines]
    assert capsys.readouterr().out == f"{lines[-1]}\n"


@pytest.mark.parametrize(
    ("code", "output", "status"),
    [
        (1, "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission", SKIP),
        (1, "==ERROR== nothing to profile", 1),
        (0, "==WARNING== No kernels were profiled.", 1),
    ],
)
def test_ncu_without_figures(code: int, output: str, status: int, place: Path, tmp_path: Path) -> None:
    StandIn(place, ncu.TOOL, {"": (code, output)})
    assert ncu.measured(str(place / ncu.TOOL), PROGRAM, tmp_path / "tools.txt") == status
    assert output in (tmp_path / "tools.txt").read_text()


def test_nvidia_smi_says_which_card_and_driver(place: Path) -> None:
    assert machine.nvidia_smi() == "nvidia-smi is not here"
    values = "NVIDIA H200, 580.65, 143771, 1980, 3201, 700.00"
    tool = StandIn(place, "nvidia-smi", {"--format=csv,noheader,nounits": (0, values)})
    assert machine.nvidia_smi() == dict(zip(machine.ASKED, values.split(", "), strict=True))
    ((arguments, _),) = tool.calls
    assert arguments == [f"--query-gpu={','.join(machine.ASKED)}", "--format=csv,noheader,nounits", "--id=0"]
    StandIn(place, "nvidia-smi", {"": (9, "no driver")})
    assert machine.nvidia_smi() == "nvidia-smi ended with 9: no driver"
