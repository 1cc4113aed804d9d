"""Launches of the project's kernels, compiled for an NVIDIA GPU and run by the emulator on CPU tensors."""

import gc
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from gradkern.kernels.launch import Launch
from tests.aot import Driver
from tests.ptx.core_library import Settings
from tests.ptx.program import Program

Memory = tuple[int, int]
"""Addresses from the first up to the second."""


@dataclass
class Ran:
    """What has run of a kernel."""

    launches: int = 0
    instructions: int = 0


@dataclass
class Machine:
    """An emulated GPU.

    Attributes:
        arch: the compute capability, 80 or 90.
        weak: whether caches grow stale and stores arrive late.
        at_once: how many programs run at once.
        seed: of the order in which programs and warps go; each launch takes the next.
        ran: of each kernel, how much has run.
    """

    arch: int
    weak: bool = False
    at_once: int = 2
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
            program = self._programs[compiled.hash] = Program(compiled.asm["ptx"], compiled.metadata.shared)
        instructions = self.run_program(program, launch)
        ran = self.ran.setdefault(program.name, Ran())
        ran.launches += 1
        ran.instructions += 32 * instructions

    def run_program(self, program: Program, launch: Launch) -> int:
        """Run a program with the arguments and the grid of a launch."""
        kernel = launch.kernel
        arguments = [launch.arguments[name] for i, name in enumerate(kernel.arg_names) if i not in kernel.constexprs]
        arguments = [argument for argument in arguments if argument is not None]
        # Triton's own parameters follow, pointers to memory for scratch, which these kernels have none of.
        types = [parameter.type for parameter in program.parameters]
        values = [bits(argument, kind) for argument, kind in zip(arguments, types, strict=False)]
        values += [0] * (len(types) - len(values))
        self.seed += 1
        few = 2 * self.at_once
        settings = Settings(self.at_once, max(1, self.at_once // 2), 40 if self.weak else 400, self.weak, self.seed, 1 << 25)
        assert few
        return program.run(launch.grid, values, storages(arguments), settings)

    def compile(self, launch: Launch) -> Any:
        """Compile a launch for this machine."""
        triton.runtime.driver.set_active(Driver(GPUTarget("cuda", self.arch, 32)))
        return launch.compile()


def bits(argument: Any, kind: str) -> int:
    """Return an argument of a kernel as the bits of a parameter of type ``kind``."""
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    if kind in ("f32", "f64"):
        float_code, integer_code = {"f32": "fI", "f64": "dQ"}[kind]
        return struct.unpack(f"<{integer_code}", struct.pack(f"<{float_code}", argument))[0]
    return int(argument) & ((1 << int(kind[1:])) - 1)


def storages(arguments: list[Any]) -> list[Memory]:
    """Return where the tensors that are alive have their memory.

    A kernel may access no other. It is all tensors, because tables of addresses point at some that are no arguments.
    """
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    tensors += [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    found = set()
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            found.add((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
    return list(found)


@contextmanager
def serving(machine: Machine) -> Iterator[Machine]:
    """Let a machine run every launch."""
    run = Launch.run
    Launch.run = lambda launch, device: machine.run(launch)
    try:
        yield machine
    finally:
        Launch.run = run
