"""The table of instructions: the core does what it lists, the tests cover it, and what it lacks is refused by name."""

import re
from pathlib import Path

import pytest

from tests.ptx import build
from tests.ptx.core_library import core
from tests.ptx.instructions import (
    BITS,
    COMPARISONS,
    CONVERSIONS,
    FLOAT_ARITHMETIC,
    GLOBAL_MEMORY,
    INTEGER_ARITHMETIC,
    MATRICES,
    MOVES,
    SHARED_MEMORY,
    TABLE,
    WARP,
    Row,
    find,
    spellings,
)
from tests.ptx.parse import PtxError, Statement, parse
from tests.ptx.program import Program

needs_core = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

BY_TABLE = [*MOVES, *INTEGER_ARITHMETIC, *BITS, *FLOAT_ARITHMETIC, *COMPARISONS, *CONVERSIONS]
"""Rows of which a test takes every opcode from the table."""
PREFIXES_BY_TABLE = ("ld.global", "st.global", "ld.shared", "st.shared", "atom.", "red.", "redux.", "cp.async.c")
"""The same by opcodes, or from all parts of which they are made up."""


@needs_core
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.form)
def test_the_core_does_what_the_table_lists(row: Row) -> None:
    for operation in spellings(row).values():
        assert core().has_operation(operation.encode()), operation


def test_no_opcode_has_two_rows_of_the_same_operands() -> None:
    seen = [(opcode, tuple(row.kinds)) for row in TABLE for opcode in spellings(row)]
    assert len(set(seen)) == len(seen)


def test_every_row_is_tested() -> None:
    """Those not taken from the table stand in a test word by word."""
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    written = set(re.findall(r"[a-z]\w*(?:\.[\w:]+)*", tests))
    assert len(BY_TABLE) + len(GLOBAL_MEMORY) + len(SHARED_MEMORY) + len(WARP) + len(MATRICES) == len(TABLE)
    for row in (*GLOBAL_MEMORY, *SHARED_MEMORY, *WARP, *MATRICES):
        for opcode in spellings(row):
            assert opcode.startswith(PREFIXES_BY_TABLE) or opcode in written, opcode


def test_spellings() -> None:
    assert spellings(Row("a[.x|.y].<b|c>(.d=.e)", "", "")) == {
        f"a{x}.{letter}.d": f"a.{letter}.e" for x in ("", ".x", ".y") for letter in "bc"
    }


def kernel(body: str) -> str:
    return f".visible .entry some_kernel(.param .u64 some_kernel_param_0) .reqntid 32\n{{\n{body}\n}}"


@needs_core
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("mov.b32 %r1, 1;\nsin.approx.f32 %r2, %r1;", "line 4: unknown instruction sin.approx.f32"),
        ("add.sat.s32 %r2, %r1, 1;", "line 3: unknown instruction add.sat.s32"),
        ("add.rz.f32 %r2, %r1, %r1;", "line 3: unknown instruction add.rz.f32"),
        ("bar.sync 1;", "line 3: unknown operands of bar.sync"),
        ("bar.sync 0, 64;", "line 3: unknown operands of bar.sync"),
        ("shfl.sync.bfly.b32 %r1|%p1, %r2, 1, 31, -1;", "line 3: unknown operands of shfl.sync.bfly.b32"),
        ("shfl.sync.bfly.b32 %r1, %r2, 1, 7199, -1;", "line 3: unknown operands of shfl.sync.bfly.b32"),
        ("ld.global.v2.b32 {%r1}, [%rd1];", "line 3: ld.global.v2.b32 of"),
        ("ld.global.b32 {%r1, %r2}, [%rd1];", "line 3: ld.global.b32 of"),
        ("bra $L1;", r"line 3: no such label or function: \$L1"),
        ("mov.b32 %r1, 1.5;", "unknown constant or register 1.5"),
        ("ld.param.b32 %r1, [some_kernel_param_0+4];", "parameter some_kernel_param_0 has parts"),
    ],
)
def test_what_is_unknown_is_named(body: str, message: str) -> None:
    with pytest.raises(PtxError, match=f"some_kernel: {message}"):
        Program(kernel(body), 0)


def test_a_form_tells_operands_apart() -> None:
    for operands, operation in ((("%r1", "%r2"), "mov.b32"), (("%r1", ("%a", "%b")), "pack.b32")):
        assert find(Statement(1, None, "mov.b32", operands)).operation == operation
    assert find(Statement(1, None, "mov.b32", (("%a", "_"), "%r1"))).operation == "unpack.b32"


def test_a_text_without_a_kernel() -> None:
    with pytest.raises(PtxError, match="no kernel"):
        parse(".version 8.7\n.target sm_90a\n")
