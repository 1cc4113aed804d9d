"""Compile every kernel at every launch setting for GPUs that this machine lacks, and inspect the machine code.

``python tests/aot.py`` prints a table of registers; ``--json`` the same as data, which ``test_aot.py`` holds
against the rules. It must run without TRITON_INTERPRET, so the tests start it in a process of its own.

No launch is declared a second time. The real launchers are called with small CPU tensors, and the launches that they
return are compiled through Triton's own dispatch, for a driver that names a target instead of asking a device.
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from gradkern.kernels import (
    active_set,
    adamw,
    combine,
    entries,
    fair,
    graddrop,
    gradvac,
    gramian,
    jacobi,
    pcgrad,
    project,
    reduce,
    surgery,
    trimmed_mean,
)
from gradkern.kernels.launch import Launch
from gradkern.kernels.masks import Mask
from gradkern.kernels.rows import Rows, Tiles, arithmetic
from gradkern.kernels.settings import DOT_T, ONE_LAUNCH_T, OUTPUT_ROWS, SOLVER_T
from gradkern.ops import limits
from gradkern.ops.layout import TILE, Layout, column_layout, tensor_layout
from gradkern.ops.one_launch.work_list import work_list

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BRIEF = ("fp32", "bf16")
"""The dtypes of a brief run."""
IN_FP64 = ("active_set", "fair", "jacobi")
"""The kernels that have no other dtype."""
GRAMIAN_T = (1, 3, 8, 12, 16, 32, DOT_T)
"""The smallest, the usual and the largest T of the register form (8 in 16 bits, 12 otherwise), and the largest T of
each setting of the other form."""
MASKED_T = {"fp64": (3, 16, DOT_T), "fp32": (3, 12, 16, 32, DOT_T), "bf16": (3, 8, 16, 32, DOT_T), "fp16": (3, 16)}
"""The T among ``GRAMIAN_T`` that are built with a mask, on sm_90."""
MASKED_T_ELSEWHERE = {"fp64": (3,), "fp32": (DOT_T,), "bf16": (3,)}
"""The same for the other targets: each form and each size of a number once."""
WIDE_BLOCKS = (1, 64, 128)
"""Blocks of a mask that leave loads whole. A block of whole 128-bit loads is compiled to the same code as 64 if it is
smaller than 128, and otherwise to the same as 128."""
NARROW_BLOCKS = {"fp32": (2, 3), "bf16": (2, 4)}
"""Blocks that cut loads, one for each way of cutting. They are built on sm_90 and shown in the table."""

TRIMMED = (1, 0, 2, 4, 8)
"""The k of trimmed means: the usual one, and others on sm_90."""

SURGERY_T = (1, 3, ONE_LAUNCH_T)
"""The smallest, the usual and the largest T of the one launch."""

WIDE = r"\bLDG(STS)?\.\S*128\b"
NARROW = r"\bLDG(STS)?\.(?!\S*128\b)"


class Case(NamedTuple):
    """Launch to compile, with its name in the table and whether it streams rows."""

    kernel: str
    dtype: str
    setting: str
    launch: Launch
    streams: bool


class Driver:
    """The part of a Triton driver that compiling needs: the target."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        """Return the target as a device, because Triton caches compiled kernels by device."""
        return str(self.target.arch)

    def get_current_stream(self, device: str) -> int:
        return 0


def cases(target: GPUTarget) -> Iterator[Case]:
    """Yield every kernel at every setting, as the operators launch it: with tables of addresses in every dtype.

    Matrices differ only in how an address is found, so they are compiled in float32 alone.
    """
    layout = column_layout((0, 2 * TILE))
    tiles, _ = _tiles(layout)
    pieces, bounds = layout.pieces_on(torch.device("cpu"), 1)
    for table in (False, True):
        for name, dtype in DTYPES.items() if table else (("fp32", torch.float32),):
            brief = name == "fp16"  # differs from bf16 in the conversions only
            for T in (8, DOT_T) if brief else GRAMIAN_T:
                rows = _rows(T, dtype, table)
                partials = torch.empty(len(pieces), T * (T + 1) // 2, dtype=arithmetic(dtype))
                launch = gramian.gramian(rows, tiles, None, pieces, partials, _device(target))
                yield Case("gramian", name, f"T={T}", launch, True)
            w = torch.empty(1, 3, dtype=arithmetic(dtype))
            out = _rows(1, dtype, table)
            launch = combine.combine(_rows(3, dtype, table), tiles, None, w, out, None)
            yield Case("combine", name, "any T", launch, True)
            if table:
                for count in (2,) if brief else (2, 3):
                    yield Case(
                        "adamw", name, "amsgrad" if count == 3 else "any T", _adamw(dtype, tiles, None, count), True
                    )
            for R in (OUTPUT_ROWS,) if brief else (1, 2, 4, OUTPUT_ROWS):
                W = torch.empty(1, R, 3, dtype=arithmetic(dtype))
                launch = project.project(_rows(3, dtype, table), tiles, W, _rows(R, dtype, table))
                yield Case("project", name, f"R={R}", launch, True)
    yield from entrywise_cases(target)
    yield from masked_cases(target)
    if target.backend == "cuda":
        yield from surgery_cases(target)
    for name in ("fp64", "fp32"):
        partials = torch.empty(len(pieces), 6, dtype=DTYPES[name])
        M = torch.empty(1, 3, 3, dtype=DTYPES[name])
        yield Case("reduce", name, "any T", reduce.reduce(partials, bounds, M), False)
        for T in (1, 3, 8, 64):
            M = torch.empty(1, T, T, dtype=DTYPES[name])
            order_keys = torch.empty(1, T, T)
            yield Case("pcgrad", name, f"T={T}", pcgrad.pcgrad(M, order_keys, "all", M), False)
            targets, update_mask = torch.empty(1, T, T, dtype=torch.float64), torch.empty(T, dtype=torch.bool)
            if T in (3, 64):
                yield Case("pcgrad", name, f"T={T}, no keys", pcgrad.pcgrad(M, None, "average", M), False)
                state, eps = gradvac.Targets(targets, update_mask), torch.empty(1, dtype=torch.float64)
                for of_segments, setting in ((None, f"T={T}"), (eps, f"T={T}, several eps")):
                    launch = gradvac.gradvac(M, order_keys, state, 0.1, of_segments, M)
                    yield Case("gradvac", name, setting, launch, False)
    yield from solver_cases()
    index = torch.empty(200, dtype=torch.int64)
    for name, dtype in DTYPES.items():
        values = torch.empty(3, 200, dtype=arithmetic(dtype))
        launch = entries.gather(_rows(3, dtype, True), index[:2], index, values)
        yield Case("gather", name, "any T", launch, False)
        yield Case("scatter", name, "", entries.scatter(values[0], index[:2], index, _rows(1, dtype, True)), False)


def solver_cases() -> Iterator[Case]:
    """Yield the solvers of T x T problems, for each number of threads and the largest T of each."""
    f64 = torch.float64
    of_sets = {**limits.ACTIVE_SET._asdict(), "rounds": 1}
    for T in (1, 8, 16, 32, SOLVER_T):
        K, v, free = torch.empty(1, T, T, dtype=f64), torch.empty(1, T, dtype=f64), torch.empty(1, T, dtype=torch.bool)
        launch = active_set.active_set(K, v.unsqueeze(-1), free, None, v, of_sets)
        yield Case("active_set", "fp64", f"T={T}", launch, False)
        launch = active_set.active_set(K, torch.empty(1, T, 2, dtype=f64), free, v[:, 0], v, of_sets)
        yield Case("active_set", "fp64", f"T={T}, scaled", launch, False)
        yield Case("fair", "fp64", f"T={T}", fair.fair(K, v, 1.0, v, limits.FAIR._asdict()), False)
        yield Case("jacobi", "fp64", f"T={T}", jacobi.jacobi(K, K.clone(), 6, 1e-16), False)


def entrywise_cases(target: GPUTarget) -> Iterator[Case]:
    """Yield GradDrop and the trimmed mean, without and with coefficients and a mask, on tables and on a matrix.

    Tables are what the operators use; matrices are built in float32.
    """
    thorough = target.arch == 90
    for table in (False, True):
        for name, dtype in DTYPES.items() if table else (("fp32", torch.float32),):
            for full in (False, True) if table and (thorough or name == "fp32") else (False,):
                extra = ", in full" if full else ""
                yield Case("graddrop", name, f"any T{extra}", _graddrop(dtype, table, full), True)
                for k in TRIMMED if thorough and table and name in BRIEF else TRIMMED[:1]:
                    yield Case("trimmed_mean", name, f"k={k}{extra}", _trimmed(dtype, table, k, full), k < 2)


def _graddrop(dtype: torch.dtype, table: bool, full: bool) -> Launch:
    rows, tiles, mask, out, kept = _entrywise(dtype, table, full)
    coins = graddrop.Coins(torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    coefficients = torch.empty(2, 3, dtype=arithmetic(dtype)) if full else None
    return graddrop.graddrop(rows, tiles, mask, coins, coefficients, out, kept)


def _trimmed(dtype: torch.dtype, table: bool, k: int, full: bool) -> Launch:
    rows, tiles, mask, out, kept = _entrywise(dtype, table, full)
    weights = torch.empty(3, dtype=arithmetic(dtype)) if full else None
    return trimmed_mean.trimmed_mean(rows, tiles, mask, k, weights, out, kept)


def _entrywise(
    dtype: torch.dtype, table: bool, masked: bool
) -> tuple[Rows, Tiles, Mask | None, Rows, torch.Tensor | None]:
    tiles, units = _tiles(tensor_layout((2 * TILE,), (0,), 1, (0,), 128))
    mask = Mask(units, 128, torch.empty(3, dtype=torch.int64)) if masked else None
    kept = torch.empty((), dtype=torch.int64) if masked else None
    return _rows(3, dtype, table), tiles, mask, _rows(1, dtype, table), kept


def masked_cases(target: GPUTarget) -> Iterator[Case]:
    """Yield the kernels that take a mask, in every form of it, on tables of addresses, as no other rows are masked."""
    thorough = target.arch == 90
    for name, counts in (MASKED_T if thorough else MASKED_T_ELSEWHERE).items():
        for block in WIDE_BLOCKS:
            yield from _masked(target, name, counts, block, True)
        for block in NARROW_BLOCKS.get(name, ()) if thorough else ():
            yield from _masked(target, name, (3,), block, False)


def _masked(target: GPUTarget, name: str, counts: tuple[int, ...], block: int, streams: bool) -> Iterator[Case]:
    dtype = DTYPES[name]
    layout = tensor_layout((2 * TILE,), (0,), 1, (0,), block)
    tiles, units = _tiles(layout)
    pieces, _ = layout.pieces_on(torch.device("cpu"), 1)
    mask = Mask(units, block, torch.empty(3, dtype=torch.int64))
    for T in counts:
        partials = torch.empty(len(pieces), T * (T + 1) // 2, dtype=arithmetic(dtype))
        launch = gramian.gramian(_rows(T, dtype, True), tiles, mask, pieces, partials, _device(target))
        yield Case("gramian", name, f"T={T}, block {block}", launch, streams)
    w, kept = torch.empty(1, 3, dtype=arithmetic(dtype)), torch.empty((), dtype=torch.int64)
    launch = combine.combine(_rows(3, dtype, True), tiles, mask, w, _rows(1, dtype, True), kept)
    yield Case("combine", name, f"any T, block {block}", launch, streams)
    yield Case("adamw", name, f"any T, block {block}", _adamw(dtype, tiles, mask, 2), streams)


def _adamw(dtype: torch.dtype, tiles: Tiles, mask: Mask | None, n_moments: int) -> Launch:
    """Return a launch of AdamW. With a mask it also has the numbers that may skip and scale it."""
    wide, number = arithmetic(dtype), None if mask is None else torch.empty(())
    kept = None if mask is None else torch.empty((), dtype=torch.int64)
    state = adamw.AdamWState(_rows(1, dtype, True), _rows(n_moments, wide, True), torch.zeros(1, dtype=torch.int64))
    step = adamw.AdamWStep(number, number, (1e-3, 0.9, 0.999, 0.01, 1e-8))
    return adamw.adamw(_rows(3, dtype, True), tiles, mask, torch.empty(1, 3, dtype=wide), kept, state, step)


def surgery_cases(target: GPUTarget) -> Iterator[Case]:
    """Yield the one launch, in every form of the rows and of a mask, and once with every optional argument."""
    for name in ("fp64", "fp32", "bf16"):
        for T in SURGERY_T:
            yield Case("surgery", name, f"T={T}", _surgery(T, DTYPES[name], True), True)
            for block in (1, 128) if target.arch == 90 or T == 3 else ():
                yield Case("surgery", name, f"T={T}, block {block}", _surgery(T, DTYPES[name], True, block), True)
            if target.arch == 90 or T == 3:
                yield Case("surgery", name, f"T={T}, no keys", _surgery(T, DTYPES[name], True, keyed=False), True)
        full = _surgery(3, DTYPES[name], True, 128, full=True)
        yield Case("surgery", name, "T=3, block 128, GradVac in full", full, True)
    for T in SURGERY_T:
        yield Case("surgery", "fp32", f"T={T}", _surgery(T, torch.float32, False), True)


def _surgery(
    T: int, dtype: torch.dtype, table: bool, block: int | None = None, keyed: bool = True, full: bool = False
) -> Launch:
    layout = tensor_layout((2 * TILE,), (0,), 2, (0,), block or 1)
    tiles, units = _tiles(layout)
    mask = None if block is None else Mask(units, block, torch.empty(3, dtype=torch.int64))
    listed = work_list(layout, T, dtype.itemsize)
    shared = torch.zeros(surgery.shared_size(1, listed.n_groups), dtype=torch.int32)
    work = surgery.Work(*listed.tables_on(torch.device("cpu")), listed.n_pieces, listed.n_groups, shared)
    M, order_keys, ones = torch.empty(1, T, T, dtype=arithmetic(dtype)), torch.empty(1, T, T), torch.ones(T)
    if full:
        method = surgery.Projection(order_keys, "all", M.double(), ones.bool(), 0.1, mean=False)
    elif keyed:
        method = surgery.Projection(order_keys, "all", None, None, 0.0, mean=False)
    else:
        method = surgery.Projection(None, "average", None, None, 0.0, mean=False)
    kept = torch.zeros((), dtype=torch.int64)
    results = surgery.Results(M, M[:, 0].contiguous(), _rows(1, dtype, table), kept)
    return surgery.surgery(
        _rows(T, dtype, table), tiles, surgery.Masking(mask, products=full), work, method, results, programs=1
    )


def _tiles(layout: Layout) -> tuple[Tiles, torch.Tensor]:
    table, units = layout.tiles_on(torch.device("cpu"))
    return Tiles(table, TILE), units


def _device(target: GPUTarget) -> gramian.Target:
    return gramian.Target(tensor_cores=target.backend == "cuda", interpreted=False)


def _rows(T: int, dtype: torch.dtype, table: bool) -> Rows:
    if table:
        return Rows(torch.zeros(T, 1, dtype=torch.int64), 1, T, dtype, table=True)
    return Rows(torch.empty(T, 2 * TILE, dtype=dtype), 2 * TILE, T, dtype, table=False)


def build(arch: str, index: int) -> dict[str, Any]:
    """Compile case ``index`` for ``arch`` and return the facts about its machine code."""
    target = TARGETS[arch]
    triton.runtime.driver.set_active(Driver(target))
    case = list(cases(target))[index]
    compiled = case.launch.compile()
    source = "table" if case.launch.arguments.get("TABLE") else "matrix"
    report: dict[str, Any] = {
        "kernel": case.kernel,
        "dtype": case.dtype,
        "setting": case.setting,
        "source": source if case.streams else "",
        "arch": arch,
        "streams": case.streams,
        "shared": compiled.metadata.shared,
    }
    if target.backend == "cuda":
        report["fused"] = len(re.findall(r"\bfma\.rn\b", compiled.asm["ptx"]))
        return report | inspect_cubin(compiled.asm["cubin"])
    return report | inspect_amdgcn(compiled.asm["amdgcn"])


def inspect_cubin(cubin: bytes) -> dict[str, Any]:
    """Return the registers, the bytes of stack, and the instruction counts of the streaming loops."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        sass = _cuobjdump("-sass", file.name)
    found = dict(re.findall(r"\b(REG|STACK):(\d+)", usage))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"]), "loops": streaming_loops(sass)}


def streaming_loops(sass: str) -> list[dict[str, int]]:
    """Count wide, narrow and local loads of the innermost loops with 128-bit loads from global memory.

    Only innermost loops count, because the loop over tiles around them also holds the path for short tiles, which is
    cold and may spill. ``LDGSTS`` are loads straight into shared memory.
    """
    code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", sass)
    instructions = [instruction for _, instruction in code]
    loops = find_loops([int(address, 16) for address, _ in code], instructions)
    wide = [loop for loop in loops if any(re.search(WIDE, instructions[i]) for i in loop)]
    patterns = {"wide": WIDE, "narrow": NARROW, "local": r"\b(LDL|STL)\b", "instructions": ""}
    return [
        {name: sum(1 for i in loop if re.search(pattern, instructions[i])) for name, pattern in patterns.items()}
        for loop in wide
        if not any(other < loop for other in wide)
    ]


def find_loops(addresses: list[int], instructions: list[str]) -> list[set[int]]:
    """Return the natural loops, as sets of instruction numbers.

    A branch to a smaller address closes a loop. The loop holds all instructions from which that branch is reached
    without passing its target, also those laid out of line. If even the first instruction reaches the branch around the
    target, the branch jumped back to shared code and closes no loop. The branch to itself at the end of every kernel
    closes none either.
    """
    number = {address: i for i, address in enumerate(addresses)}
    before: list[set[int]] = [set() for _ in instructions]
    backward = []
    for i, instruction in enumerate(instructions):
        jump = re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", instruction)
        if jump:
            target = number[int(jump[1], 16)]
            before[target].add(i)
            if target < i:
                backward.append((target, i))
        if i + 1 < len(instructions) and not re.match(r"(BRA(?!.*P\d)|EXIT|RET)", instruction):
            before[i + 1].add(i)
    loops: dict[int, set[int]] = {}
    for head, tail in backward:
        loop, todo = {head}, [tail]
        while todo:
            i = todo.pop()
            if i not in loop:
                loop.add(i)
                todo += before[i]
        if head == 0 or 0 not in loop:
            loops[head] = loops.get(head, set()) | loop
    return list(loops.values())


def inspect_amdgcn(assembly: str) -> dict[str, Any]:
    """Return vector registers (accumulation registers included), bytes of stack, and the whole kernel as one loop.

    AMD's kernels have enough registers and spill nowhere, so loops need no separate treatment.
    """
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    stack = re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
    assert registers is not None
    assert stack is not None
    patterns = {"wide": r"_load_dwordx4\b", "local": r"\bscratch_(load|store)"}
    loops = [{name: len(re.findall(pattern, assembly)) for name, pattern in patterns.items()}]
    return {"registers": int(registers[1]), "stack": int(stack[1]), "loops": loops}


def _cuobjdump(*arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def build_all(whole: Collection[str]) -> list[dict[str, Any]]:
    """Compile for every target, on two processes.

    Targets of ``whole`` have every case; others one case per kernel and dtype of ``BRIEF``, and one of each kernel
    ``IN_FP64``.
    """
    jobs = []
    for arch, target in TARGETS.items():
        seen = set()
        for index, case in enumerate(cases(target)):
            key = (case.kernel, case.dtype)
            if arch in whole or ((case.dtype in BRIEF or case.kernel in IN_FP64) and key not in seen):
                jobs.append((arch, index))
            seen.add(key)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(build, *zip(*jobs, strict=True), chunksize=4))


def table(reports: list[dict[str, Any]]) -> str:
    """Return registers as markdown: a line for each kernel, dtype, setting and source, a column for each target."""
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for report in reports:
        key = tuple(report[k] for k in ("kernel", "dtype", "setting", "source"))
        stack = f" (stack {report['stack']})" if report["stack"] else ""
        lines.setdefault(key, {})[report["arch"]] = f"{report['registers']}{stack}"
    head = ("kernel", "dtype", "setting", "rows", *TARGETS)
    body = [(*key, *(cells.get(arch, "") for arch in TARGETS)) for key, cells in lines.items()]
    rows = [head, ("---",) * len(head), *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the reports as JSON instead of a table")
    parser.add_argument(
        "--whole",
        nargs="*",
        default=list(TARGETS),
        choices=TARGETS,
        help="targets that have every setting (default: all); others have each kernel once in float32 and in bfloat16",
    )
    arguments = parser.parse_args()
    if arguments.json and hasattr(os, "nice"):
        os.nice(10)  # other tests run beside it
    reports = build_all(arguments.whole)
    print(json.dumps(reports) if arguments.json else table(reports))


if __name__ == "__main__":
    main()
