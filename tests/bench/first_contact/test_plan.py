"""The plan of first contact: nine minutes, eight files, commands that exist, and a checkout without its link."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bench.first_contact import __main__ as command
from bench.first_contact import sweep
from bench.first_contact.checkout import ROOT, link_kernels
from bench.first_contact.one_launch import SIZES
from bench.first_contact.one_launch import cases as launch_cases
from bench.first_contact.plan import CARD, DRY, GATE, SUMMARY, plan


def test_it_fits_nine_minutes_and_eight_files() -> None:
    steps = plan(CARD, Path("out"))
    assert sum(step.limit for step in steps) <= 9 * 60
    assert len({name for step in steps for name in step.files} | set(SUMMARY)) <= 8
    assert steps[0].name == GATE
    assert len({step.name for step in steps}) == len(steps)


def test_the_notes_have_its_table() -> None:
    lines = (ROOT / "bench" / "NOTES.md").read_text().splitlines()
    start = lines.index("| step | limit, s | what it does | file |") + 2
    for step, line in zip(plan(CARD, Path("out")), lines[start:], strict=False):
        name, limit, _, files = (cell.strip() for cell in line.split("|")[1:-1])
        assert (name, limit, files) == (step.name, f"{step.limit:g}", ", ".join(f"`{file}`" for file in step.files))


@pytest.mark.parametrize("device", [CARD, DRY])
def test_its_commands_exist(device: str) -> None:
    for step in plan(device, Path("out")):
        kind, what, *_ = step.command
        assert kind == "-c" or find_spec(what) is not None
        assert any(device in argument for argument in step.command)


def test_the_sweep_has_each_pass_at_each_T_and_dtype_once() -> None:
    cases = sweep.cases(3 << 30)
    assert len(set(cases)) == len(cases) == 7 * 2 * 5
    assert {case.T for case in cases} == {2, 3, 4, 8, 16, 32, 40}
    for case in cases:
        n_bytes = case.T * case.P * {"float32": 4, "bfloat16": 2}[case.dtype]
        assert 2 << 30 <= n_bytes <= 4 << 30
        assert case.P % 16 == 0  # or rows of a matrix would not all start at multiples of 16 bytes


def test_one_launch_meets_three_at_four_sizes_for_the_model_and_by_parameter() -> None:
    cases = launch_cases(SIZES["cuda"])
    assert len(set(cases)) == len(cases) == 3 * 2 * 2 * 4
    assert {case.P for case in cases} == {10**5, 10**6, 10**7, 10**8}


@pytest.mark.parametrize("stands_there", ["nothing", "a file", "a broken link"])
def test_a_checkout_without_its_link_gets_it(stands_there: str, tmp_path: Path) -> None:
    for folder in ("kernels", "gradkern"):
        (tmp_path / folder).mkdir()
    (tmp_path / "kernels" / "launch.py").write_text("here = True\n")
    (tmp_path / "gradkern" / "__init__.py").touch()
    link = tmp_path / "gradkern" / "kernels"
    if stands_there == "a file":
        link.write_text("../kernels")
    elif stands_there == "a broken link":
        link.symlink_to("nowhere")
    link_kernels(tmp_path)
    link_kernels(tmp_path)
    code = "import gradkern.kernels.launch as launch; print(launch.here)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True).stdout == "True\n"


def test_this_checkout_has_its_link() -> None:
    before = (ROOT / "gradkern" / "kernels").stat()
    link_kernels()
    assert (ROOT / "gradkern" / "kernels").stat() == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["--minutes", "0"],
        ["--minutes", "nan"],
        ["--minutes", "nine"],
        ["--only", "nothing"],
        ["--out", __file__],
        ["--out", "/proc"],  # a folder that takes no files, from nobody
    ],
)
def test_bad_arguments_are_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert f"argument {arguments[0]}" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--out", str(tmp_path)]) == 1
    assert "--dry tries all steps without a GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
