"""A stand-in for a GPU: the Triton back end serves CPU tensors, with a driver that launches nothing.

``python -m bench.host.standin SECONDS TENSORS...`` prints raw results as JSON. It changes gradkern and Triton for its
whole process, so ``run.py`` starts a process for it. The kernels are compiled for sm_90, without TRITON_INTERPRET.

The host's code is the one that runs with a GPU, with three exceptions. PyTorch's own small operations, such as the
draw of PCGrad's orders, compute on the CPU in place of a launch. A table that is needed again is found again, as it is
with a GPU, but a new one takes no copy to the device. And nothing asks for the current stream.
"""

import argparse
import json
from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from bench.host import stages
from bench.host.prepared import Prepared, shapes
from gradkern.ops import registry
from gradkern.ops.layout import Tables
from gradkern.ops.one_launch import surgery  # noqa: F401  (registers)
from gradkern.ops.triton import adamw, address_tables, combine, entries, gramian, methods  # noqa: F401  (register)
from gradkern.ops.triton.backend import BACKEND


class Driver:
    """The part of a Triton driver that compiling and launching need.

    Attributes:
        launches: the number of launches so far.
    """

    def __init__(self) -> None:
        self.launches = 0
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 1 << 20},
            load_binary=lambda name, binary, shared, device: (object(), object(), 0, 0, 1024),
        )

    def get_current_target(self) -> GPUTarget:
        """Return an H100's or H200's architecture."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """Return the number of the only device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return the address of a stream."""
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Return a function that counts a launch."""

        def launch(*args: Any) -> None:
            self.launches += 1

        return launch


def serve_the_cpu(driver: Driver) -> None:
    """Make the Triton back end, with this driver, the one of CPU tensors, for the rest of the process."""
    triton.runtime.driver.set_active(driver)
    for op in registry.operators.values():
        if BACKEND.device_type in op.implementations:
            op.implementations["cpu"] = op.implementations[BACKEND.device_type]
    address_tables._table = lru_cache(address_tables.TABLES)(address_tables._table)
    Tables._once = _once


def _once(self: Tables, key: tuple[Any, ...], tables: Callable[[], Any]) -> tuple[Tensor, ...]:
    """Do what ``Tables._once`` does for a GPU: keep the tensors."""
    if key not in self._on_device:
        self._on_device[key] = tuple(torch.from_numpy(table) for table in tables())
    return self._on_device[key]


def main() -> None:
    """Measure the stages of a step for each number of tensors."""
    parser = argparse.ArgumentParser(prog="python -m bench.host.standin", description=main.__doc__)
    parser.add_argument("seconds", type=float, help="approximate time for each number of tensors")
    parser.add_argument("tensors", type=int, nargs="+", help="numbers of tensors")
    options = parser.parse_args()
    driver = Driver()
    serve_the_cpu(driver)
    rows = []
    for n in options.tensors:
        prepared = Prepared(shapes(n))
        row = stages.measured(prepared, options.seconds)
        prepared.renew()
        launches = [driver.launches]
        for step in (prepared.step, prepared.adamw.step):
            step()
            launches.append(driver.launches)
        of_step, of_adamw = launches[1] - launches[0], launches[2] - launches[1]
        rows.append(row | {"launches": {stages.STEP: of_step, stages.ADAMW: of_adamw}})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
