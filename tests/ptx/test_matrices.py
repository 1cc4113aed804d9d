"""Matrix instructions against NumPy. Which elements a lane holds is written down here once more, from the manual."""

from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from tests.ptx import build
from tests.ptx.core_library import Trap
from tests.ptx.snippets import Array, run

if reason := build.why_not():
    pytest.skip(reason, allow_module_level=True)

RNG = np.random.default_rng(0)
LANES = range(32)


class Kind(NamedTuple):
    """A type of elements: how many lie in a register, and how they become bits of it."""

    per_register: int
    torch_dtype: torch.dtype
    bits: Any


KINDS = {
    "bf16": Kind(2, torch.bfloat16, np.uint16),
    "f16": Kind(2, torch.float16, np.uint16),
    "tf32": Kind(1, torch.float32, np.uint32),
    "f64": Kind(1, torch.float64, np.uint64),
}


def matrix(kind: str, *shape: int) -> tuple[Array, Array]:
    """Return random elements as float64, and as bits. Small integers and their eighths: all sums are exact."""
    values = RNG.integers(-16, 17, shape) / 8
    signed = {2: torch.int16, 4: torch.int32, 8: torch.int64}[np.dtype(KINDS[kind].bits).itemsize]
    bits = torch.from_numpy(values).to(KINDS[kind].torch_dtype).view(signed).numpy()
    return values, np.ascontiguousarray(bits).view(KINDS[kind].bits)


def registers(bits: Array, places: list[list[tuple[int, int]]]) -> Array:
    """Return the registers of each lane, (32, n), from the places of the elements in each, the lowest first."""
    width = bits.dtype.itemsize * 8
    word = np.uint64 if width == 64 else np.uint32
    out = np.zeros((32, len(places) // 32), word)
    for i, elements in enumerate(places):
        value = sum(int(bits[place]) << width * e for e, place in enumerate(elements))
        out[i // out.shape[1], i % out.shape[1]] = value
    return out


def places_of_A(m: int, k: int, n: int) -> list[list[tuple[int, int]]]:
    """Return, lane by lane, where the elements of each register are in A; ``n`` elements lie in one."""
    parts = [(row, column) for column in range(0, k, 4 * n) for row in range(0, m, 8)]
    return [
        [(row + lane // 4, column + n * (lane % 4) + e) for e in range(n)] for lane in LANES for row, column in parts
    ]


def places_of_B(k: int, n: int) -> list[list[tuple[int, int]]]:
    return [[(row + n * (lane % 4) + e, lane // 4) for e in range(n)] for lane in LANES for row in range(0, k, 4 * n)]


def places_of_C(m: int) -> list[tuple[int, int]]:
    return [(row + lane // 4, 2 * (lane % 4) + e) for lane in LANES for row in range(0, m, 8) for e in range(2)]


PRODUCTS = {
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32": ("tf32", 16, 8),
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": ("bf16", 16, 16),
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": ("f16", 16, 16),
    "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64": ("f64", 8, 4),
    "mma.sync.aligned.m16n8k16.row.col.f64.f64.f64.f64": ("f64", 16, 16),
}


@pytest.mark.parametrize("opcode", PRODUCTS)
def test_products(opcode: str) -> None:
    kind, m, k = PRODUCTS[opcode]
    wide = kind == "f64"
    (A, A_bits), (B, B_bits) = matrix(kind, m, k), matrix(kind, k, 8)
    C = RNG.integers(-9, 9, (m, 8)).astype(float)
    n = KINDS[kind].per_register
    of_A, of_B = registers(A_bits, places_of_A(m, k, n)), registers(B_bits, places_of_B(k, n))
    of_C = np.array([C[place] for place in places_of_C(m)]).reshape(32, -1).astype("f8" if wide else "f4")
    out = np.zeros_like(of_C)
    text, names = "", {}
    size = 8 if wide else 4
    for name, number, array in (("a", 0, of_A), ("b", 1, of_B), ("c", 2, of_C)):
        count = array.shape[1]
        text += f"mad.wide.u32 %at, %t, {size * count}, %a{number};"
        names[name] = [f"%{name}_{i}" for i in range(count)]
        for i, register in enumerate(names[name]):
            text += f"ld.global.b{8 * size} {{{register}}}, [%at + {size * i}];"
    results = [f"%d_{i}" for i in range(out.shape[1])]
    vectors = ", ".join("{" + ", ".join(v) + "}" for v in (results, names["a"], names["b"], names["c"]))
    text += f"{opcode} {vectors}; mad.wide.u32 %at, %t, {size * len(results)}, %a3;"
    text += "".join(f"st.global.b{8 * size} [%at + {size * i}], {{{d}}};" for i, d in enumerate(results))
    run(text, [of_A, of_B, of_C, out])
    expected = A @ B + C
    np.testing.assert_array_equal(out.ravel(), [expected[place] for place in places_of_C(m)])


def test_tf32_leaves_the_last_bits_out() -> None:
    """1 + 2^-11 is 1 to a tensor core: of 23 bits behind the point it sees 10."""
    a, b = np.float32(1 + 2**-11).view("u4"), np.float32(1).view("u4")
    out = np.zeros(1, np.float32)
    text = f"""
        mov.b32 %x, {a}; mov.b32 %y, {b}; mov.b32 %z, 0;
        mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32
            {{%d, %e, %f, %g}}, {{%x, %x, %x, %x}}, {{%y, %y}}, {{%z, %z, %z, %z}};
        st.global.b32 [%a0], %d;
    """
    run(text, [out])
    assert out[0] == 8


@pytest.mark.parametrize("transposed", [False, True])
def test_four_matrices_are_loaded(transposed: bool) -> None:
    """The rows of matrix m are where lanes 8 m to 8 m + 7 say; here they lie in turn, in reverse."""
    elements = RNG.integers(0, 1 << 16, (32, 8), np.uint16)
    out = np.zeros((32, 4), np.uint32)
    opcode = (
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16" if transposed else "ldmatrix.sync.aligned.m8n8.x4.shared.b16"
    )
    run(STORE_ROW + f"{opcode} {{%x0, %x1, %x2, %x3}}, [%s];" + STORE_REGISTERS, [elements, out], shared=512)
    for matrix_number, lane, e in product(range(4), LANES, range(2)):
        row, column = lane // 4, 2 * (lane % 4) + e
        if transposed:
            row, column = column, row
        assert out[lane, matrix_number] >> 16 * e & 0xFFFF == elements[8 * matrix_number + row, column]


STORE_ROW = """
    mad.wide.u32 %at, %t, 16, %a0; ld.global.v4.b32 {%x0, %x1, %x2, %x3}, [%at];
    mul.lo.u32 %s, %t, 16; sub.u32 %s, 496, %s; st.shared.v4.b32 [%s], {%x0, %x1, %x2, %x3};
"""
STORE_REGISTERS = "mad.wide.u32 %at, %t, 16, %a1; st.global.v4.b32 [%at], {%x0, %x1, %x2, %x3};"


def test_four_matrices_are_stored() -> None:
    words = RNG.integers(0, 1 << 32, (32, 4), np.uint32)
    out = np.zeros((32, 8), np.uint16)
    run(
        "mad.wide.u32 %at, %t, 16, %a0; ld.global.v4.b32 {%x0, %x1, %x2, %x3}, [%at]; mul.lo.u32 %s, %t, 16;"
        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%s], {%x0, %x1, %x2, %x3};"
        "ld.shared.v4.b32 {%x0, %x1, %x2, %x3}, [%s];" + STORE_REGISTERS,
        [words, out],
        shared=512,
    )
    for matrix_number, lane, e in product(range(4), LANES, range(2)):
        found = out[8 * matrix_number + lane // 4, 2 * (lane % 4) + e]
        assert found == words[lane, matrix_number] >> 16 * e & 0xFFFF


def test_a_matrix_that_is_not_aligned() -> None:
    with pytest.raises(Trap, match="misaligned"):
        run("mov.b32 %s, 8; ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%x0, %x1, %x2, %x3}, [%s];", [], shared=512)
