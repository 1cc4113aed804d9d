"""``python -m bench.first_contact.sanitizer DEVICE OUT``: compute-sanitizer's tools on the one launch and AdamW.

The checked program first runs alone, which shows that its results are right.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from bench.first_contact.tools import run

TOOL = "compute-sanitizer"
CHECKS = ("memcheck", "racecheck", "initcheck")
ERROR = 99
"""The exit status that compute-sanitizer is told to end with if it finds an error."""
LINES = 120
"""Lines of each check's output that are kept."""


class Checked(NamedTuple):
    """The result of one check: its name, whether it found nothing, and its summary line."""

    check: str
    clean: bool
    summary: str

    def __str__(self) -> str:
        return f"{self.check}: {'clean' if self.clean else 'FOUND'}: {self.summary}"


def command(tool: str, check: str, program: list[str]) -> list[str]:
    """Return the command that runs ``program`` under a check."""
    return [tool, "--tool", check, "--error-exitcode", str(ERROR), "--print-limit", "20", *program]


def result(check: str, code: int, output: str) -> Checked:
    """Read the output of a check. Without its summary nothing was checked, whatever the exit status."""
    lines = [line.lstrip("= ").strip() for line in output.splitlines()]
    summaries = [line for line in lines if "SUMMARY:" in line]
    reason = next((line for line in reversed(lines) if line), "no output")
    return Checked(check, code == 0 and bool(summaries), summaries[-1] if summaries else f"no summary: {reason}")


def checked(tool: str, program: list[str], path: Path) -> list[Checked]:
    """Run all checks of a program at once, and add what they say to a file."""
    # Without PyTorch's cache each tensor is an allocation of its own, whose ends memcheck knows.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    running = {
        check: subprocess.Popen(
            command(tool, check, program), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for check in CHECKS
    }
    results = []
    for check, process in running.items():
        output, _ = process.communicate()
        results.append(result(check, process.returncode, output))
        kept = "\n".join(output.splitlines()[-LINES:])
        with path.open("a") as file:
            file.write(f"== {TOOL} {results[-1]}\n{kept}\n\n")
    return results


def measured(tool: str, program: list[str], path: Path) -> int:
    """Check the program, print a line of what is found, and return the exit status."""
    results = checked(tool, program, path)
    print("; ".join(map(str, results)))
    return 0 if all(of.clean for of in results) else 1


if __name__ == "__main__":
    sys.exit(run("small", TOOL, measured))
