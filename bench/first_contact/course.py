"""The course of first contact: step after step, with the summary written after each."""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.first_contact import child
from bench.first_contact.child import FAILED, NOT_RUN, PASSED, SKIPPED, Outcome
from bench.first_contact.plan import DRY, GATE, SUMMARY, Step, python
from bench.first_contact.summary import markdown

LEAST = 2 * child.GRACE
"""Seconds without which no step starts."""


class NoDevice(Exception):
    """The device cannot be used."""


@dataclass
class Course:
    """The steps of one run.

    Attributes:
        steps: the steps to run, in order.
        out: folder of all results.
        device: the device of the steps.
        minutes: time for everything together.
        found: how each step ended so far, by name.
    """

    steps: Sequence[Step]
    out: Path
    device: str
    minutes: float
    machine: dict[str, Any] = field(default_factory=dict)
    found: dict[str, Outcome] = field(default_factory=dict)

    def run(self, say: Callable[[str], object]) -> None:
        """Run all steps that the time allows. No other runs if the gate fails; if it is late, nothing was wrong.

        Raises:
            NoDevice: the device cannot be used. Nothing has been written then.
        """
        end = time.monotonic() + 60 * self.minutes
        self.out.mkdir(parents=True, exist_ok=True)
        self.machine = self._machine()
        self.write()
        for step in self.steps:
            left = end - time.monotonic()
            gate = self.found.get(GATE)
            if gate is not None and gate.status == FAILED:
                outcome = Outcome(NOT_RUN, 0.0, f"{GATE} {FAILED}")
            elif left < LEAST:
                outcome = Outcome(NOT_RUN, 0.0, "no time was left")
            else:
                say(f"{step.name}: at most {min(step.limit, left):.0f} s")
                outcome = child.run(python(step.command), min(step.limit, left), self.environment())
            self.found[step.name] = outcome
            say(f"{step.name}: {outcome.status} after {outcome.seconds:.0f} s: {outcome.message}")
            self.write()

    @property
    def ok(self) -> bool:
        """Whether every step has passed, or was skipped with a reason."""
        return all(step.name in self.found and self.found[step.name].status in (PASSED, SKIPPED) for step in self.steps)

    def environment(self) -> dict[str, str]:
        """Return what the children's environment adds: this checkout, and no settings of an earlier tuning."""
        before = os.environ.get("PYTHONPATH")
        added = {"PYTHONPATH": f"{child.ROOT}{os.pathsep}{before}" if before else str(child.ROOT)}
        added |= {"GRADKERN_TUNING": "off", "PYTHONUNBUFFERED": "1"}
        return added | ({"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"} if self.device == DRY else {})

    def write(self) -> None:
        """Write what is known so far."""
        steps = [
            {"name": step.name, "limit": step.limit, "decides": step.decides}
            | self.found.get(step.name, Outcome(NOT_RUN, 0.0, "not yet"))._asdict()
            for step in self.steps
        ]
        summary = {"dry": self.device == DRY, "minutes": self.minutes, "machine": self.machine, "steps": steps}
        texts = json.dumps(summary, indent=1) + "\n", markdown(summary, self.out)
        for name, text in zip(SUMMARY, texts, strict=True):
            _replace(self.out / name, text)

    def _machine(self) -> dict[str, Any]:
        """Return card, driver and versions. A child of its own looks them up, because looking may already fail."""
        path = self.out / ".machine.json"
        command = python(("-m", "bench.first_contact.machine", self.device, str(path)))
        try:
            outcome = child.run(command, 60, self.environment())
            if outcome.status != PASSED:
                raise NoDevice(f"{self.device} cannot be used: {outcome.message}. --dry tries all steps without a GPU")
            return json.loads(path.read_text())
        finally:
            path.unlink(missing_ok=True)


def _replace(path: Path, text: str) -> None:
    whole = path.with_name(f".{path.name}")
    whole.write_text(text)
    os.replace(whole, path)
