"""Short kernels, written in the tests, and run on NumPy arrays."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.ptx.core_library import Settings
from tests.ptx.program import Program

Array = np.ndarray[Any, Any]

DTYPES: dict[str, Any] = {
    **{f"b{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"u{bits}": np.dtype(f"u{bits // 8}") for bits in (16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (16, 32, 64)},
    "f32": np.dtype("f4"),
    "f64": np.dtype("f8"),
    "f16": np.dtype("u2"),  # as bits
    "bf16": np.dtype("u2"),
    "bf16x2": np.dtype("u4"),
    "f16x2": np.dtype("u4"),
    "pred": np.dtype("?"),
}
"""The arrays that hold values of each type."""


def run(
    body: str,
    arrays: Sequence[Array],
    *,
    threads: int = 32,
    grid: int = 1,
    shared: int = 0,
    weak: bool = False,
    ordered: bool = False,
    at_once: int = 8,
    seed: int = 0,
    patience: int = 100_000,
) -> None:
    """Run statements, in which ``%a0``, ``%a1``, … are the addresses of arrays, and ``%t`` is the thread's number."""
    n = len(arrays)
    parameters = ", ".join(f".param .u64 kernel_param_{i}" for i in range(n))
    loads = "\n".join(f"ld.param.b64 %a{i}, [kernel_param_{i}];" for i in range(n))
    text = f""".visible .entry kernel({parameters}) .reqntid {threads}
    {{
    {loads}
    mov.u32 %t, %tid.x;
    {body}
    ret;
    }}"""
    settings = Settings(
        at_once, multiprocessors=at_once, turn=5, weak=weak, ordered=ordered, seed=seed, patience=patience
    )
    values = [array.ctypes.data for array in arrays]
    ranges = [(array.ctypes.data, array.ctypes.data + array.nbytes) for array in arrays]
    Program(text, shared).run((grid,), values, ranges, settings)


def apply(statement: str, inputs: Sequence[Array], types: Sequence[str], result: str) -> Array:
    """Return what a statement makes of each element of equally long arrays.

    In the statement ``%x0``, ``%x1``, … stand for the inputs, of the given types, and ``%d`` for the result.
    """
    n = len(inputs[0])
    padded = [
        np.resize(array.astype(DTYPES[kind]), -(-n // 32) * 32) for array, kind in zip(inputs, types, strict=True)
    ]
    out = np.zeros(len(padded[0]), DTYPES[result])
    body = "mov.u32 %c, %ctaid.x; mad.lo.s32 %i, %c, 32, %t;\n"
    for k, kind in enumerate(types):
        body += load(f"%x{k}", f"%a{k}", "%i", kind)
    body += f"{statement};\n" + store(f"%a{len(types)}", "%i", "%d", result)
    run(body, [*padded, out], grid=len(out) // 32)
    return out[:n]


def load(register: str, array: str, index: str, kind: str) -> str:
    """Return statements that load an element of an array."""
    size = DTYPES[kind].itemsize
    text = f"mad.wide.u32 %at, {index}, {size}, {array};\n"
    if kind == "pred":
        return text + f"ld.global.b8 {{ %byte }}, [ %at + 0 ]; setp.ne.b16 {register}, %byte, 0;\n"
    return text + f"ld.global.b{8 * size} {{ {register} }}, [ %at + 0 ];\n"


def store(array: str, index: str, register: str, kind: str) -> str:
    """Return statements that store an element of an array; a predicate only where it is true."""
    size = DTYPES[kind].itemsize
    text = f"mad.wide.u32 %at, {index}, {size}, {array};\n"
    if kind == "pred":
        return text + f"selp.b32 %byte, 1, 0, {register}; st.global.b8 [ %at + 0 ], {{ %byte }};\n"
    return text + f"st.global.b{8 * size} [ %at + 0 ], {{ {register} }};\n"
