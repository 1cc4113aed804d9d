"""Launches of the project's kernels, compiled for an NVIDIA GPU and run by the emulator on CPU tensors."""

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

import gradkern.ops.one_launch.surgery
import gradkern.ops.triton.gramian
from gradkern.kernels.launch import Launch
from tests.aot import Driver
from tests.ptx.core_library import Settings
from tests.ptx.program import Program
from tests.ptx.tensors import storages

PATIENCE = 1 << 23
"""After so many instructions of warps with no change of memory, programs are said to wait for ever."""


@dataclass
class Ran:
    """How much of a kernel has run, instructions by the thread."""

    launches: int = 0
    instructions: int = 0

    def add(self, other: "Ran") -> None:
        """Count another one in."""
        self.launches += other.launches
        self.instructions += other.instructions


@dataclass
class Machine:
    """An emulated GPU.

    Attributes:
        arch: the compute capability, 80 or 90.
        edit: what is done to the PTX of a kernel before it runs.
        seed: of the order in which programs and warps go; each launch takes the next.
        ran: how much of each kernel has run.
    """

    arch: int
    edit: Callable[[str], str] = str
    seed: int = 0
    ran: dict[str, Ran] = field(default_factory=dict)
    _programs: dict[str, Program] = field(default_factory=dict)

    def run(self, launch: Launch) -> None:
        """Run a launch; with an empty grid do nothing."""
        if 0 in launch.grid:
            return
        compiled = self.compile(launch)
        program = self._programs.get(compiled.hash)
        if program is None:
            program = self._programs[compiled.hash] = Program(self.edit(compiled.asm["ptx"]), compiled.metadata.shared)
        self.run_program(program, launch)

    def compile(self, launch: Launch) -> Any:
        """Compile a launch for this machine."""
        triton.runtime.driver.set_active(Driver(GPUTarget("cuda", self.arch, 32)))
        return launch.compile()

    def run_program(self, program: Program, launch: Launch) -> None:
        """Run a program with the arguments and the grid of a launch."""
        kernel = launch.kernel
        arguments = [launch.arguments[name] for i, name in enumerate(kernel.arg_names) if i not in kernel.constexprs]
        arguments = [argument for argument in arguments if argument is not None]
        types = [parameter.type for parameter in program.parameters]
        values = [bits(argument, kind) for argument, kind in zip(arguments, types, strict=False)]
        values += [0] * (len(types) - len(values))  # Triton's own: memory for scratch, which these kernels do not use
        self.seed += 1
        settings = talking(self.seed) if program.talks else alone(self.seed)
        instructions = program.run(launch.grid, values, storages(arguments), settings)
        self.ran.setdefault(program.name, Ran()).add(Ran(1, 32 * instructions))


def alone(seed: int) -> Settings:
    """Return settings for programs that have nothing to do with each other: the order matters little, so few turns."""
    return Settings(at_once=2, multiprocessors=1, turn=400, weak=False, ordered=False, seed=seed, patience=PATIENCE)


def talking(seed: int) -> Settings:
    """Return settings for programs that tell each other something: many at once, short turns, weak memory."""
    return Settings(at_once=5, multiprocessors=3, turn=40, weak=True, ordered=True, seed=seed, patience=PATIENCE)


def bits(argument: Any, kind: str) -> int:
    """Return an argument of a kernel as the bits of a parameter of type ``kind``."""
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    if kind in ("f32", "f64"):
        float_code, integer_code = {"f32": "fI", "f64": "dQ"}[kind]
        return struct.unpack(f"<{integer_code}", struct.pack(f"<{float_code}", argument))[0]
    return int(argument) & ((1 << int(kind[1:])) - 1)


@contextmanager
def serving(machine: Machine) -> Iterator[None]:
    """Let a machine run every launch."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Launch, "run", lambda launch, device: machine.run(launch))
        yield


_taken_over: list[Machine] = []
"""The machine that has taken over, if one has."""


def take_over(arch: int, programs: int) -> None:
    """Let a machine run every launch of this process from now on, the one launch with so many programs."""
    machine = Machine(arch)
    _taken_over.append(machine)
    Launch.run = lambda launch, device: machine.run(launch)  # type: ignore[method-assign]
    gradkern.ops.triton.gramian.is_interpreted = lambda device: False
    gradkern.ops.one_launch.surgery.n_programs = lambda device, n_items: min(n_items, programs)


@contextmanager
def programs_at_once(n: int) -> Iterator[None]:
    """Let the one launch have ``n`` programs."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gradkern.ops.one_launch.surgery, "n_programs", lambda device, n_items: n)
        yield


def ran() -> dict[str, Ran]:
    """Return how much of each kernel has run on the machine that has taken over."""
    return _taken_over[0].ran if _taken_over else {}
