"""THE TABLE: every form of instruction that the emulator knows, and what it does.

They cover the code that Triton 3.6 to 3.9 compiles from this project's kernels. Any other form raises
:class:`~tests.ptx.parse.PtxError`. A row may stand for several opcodes, and each is an operation of the core, of the
same name:

- ``<a|b>``: one of these;
- ``[a]``, ``[a|b]``: may be there, and changes nothing here: a hint for speed, or the only way that the core has;
- ``(a=b)``: spelled a, called b in the core.

Operands: ``d`` and ``p`` at the beginning are results; ``[a]`` is an address, ``{a}`` a vector, ``a...`` one register
or a vector; ``0`` must be that number; ``-a`` has no effect here.
"""

import re
from itertools import product
from typing import NamedTuple

from tests.ptx.parse import Address, Operand, PtxError, Statement


class Row(NamedTuple):
    """A form of instruction."""

    form: str
    operands: str
    does: str

    @property
    def kinds(self) -> list[str]:
        """Return its operands one by one."""
        return [kind.strip() for kind in self.operands.split(",") if kind.strip()]

    @property
    def n_outputs(self) -> int:
        """Return how many of its operands are results."""
        return sum(kind.strip("{.}") in ("d", "p") for kind in self.kinds)


INTEGERS = "<u16|s16|u32|s32|u64|s64>"
FLOATS = "<f32|f64>"
ORDERS = "<lt|le|gt|ge>"

MOVES = [
    Row("mov.<pred|b16|u16|b32|u32|b64|u64>", "d, a", "d = a"),
    Row("(mov=pack).<b32|b64>", "d, {a}", "d = the parts of a side by side, the first in the lowest bits"),
    Row("(mov=unpack).<b32|b64>", "{d}, a", "d = the parts of a, the lowest bits first"),
    Row("selp.<b16|b32|f32|b64|f64>", "d, a, b, q", "d = a where q, else b"),
    Row("(ld.param=mov).<b32|b64>", "d, [parameter]", "d = the parameter of the kernel or function"),
    Row("(st.param=mov).<b32|b64>", "[parameter], a", "an argument of the next call = a"),
]
INTEGER_ARITHMETIC = [
    Row(f"add.{INTEGERS}", "d, a, b", "d = a + b, wrapped around"),
    Row(f"sub.{INTEGERS}", "d, a, b", "d = a - b, wrapped around"),
    Row("neg.<s16|s32|s64>", "d, a", "d = -a, wrapped around"),
    Row(f"min.{INTEGERS}", "d, a, b", "d = the smaller of a and b"),
    Row(f"max.{INTEGERS}", "d, a, b", "d = the larger of a and b"),
    Row(f"mul.lo.{INTEGERS}", "d, a, b", "d = the low half of a b"),
    Row("mul.hi.<u32|s32>", "d, a, b", "d = the high half of a b"),
    Row("mul.wide.<u32|s32>", "d, a, b", "d = a b, in 64 bits"),
    Row(f"mad.lo.{INTEGERS}", "d, a, b, c", "d = the low half of a b + c"),
    Row("mad.wide.<u32|s32>", "d, a, b, c", "d = a b + c; c and d have 64 bits"),
    Row(f"div.{INTEGERS}", "d, a, b", "d = a / b, rounded towards zero"),
    Row(f"rem.{INTEGERS}", "d, a, b", "d = what division leaves of a"),
]
BITS = [
    Row("and.<pred|b16|b32|b64>", "d, a, b", "d = a & b"),
    Row("or.<pred|b16|b32|b64>", "d, a, b", "d = a | b"),
    Row("xor.<pred|b16|b32|b64>", "d, a, b", "d = a ^ b"),
    Row("not.<pred|b16|b32|b64>", "d, a", "d = the bits of a inverted"),
    Row("shl.<b16|b32|b64>", "d, a, n", "d = a shifted left by n; all zeros from the width on"),
    Row("shr.<u16|u32|u64>", "d, a, n", "d = a shifted right by n, zeros moved in"),
    Row("shr.<s16|s32|s64>", "d, a, n", "d = a shifted right by n, its sign moved in"),
    Row("bfe.<u32|s32>", "d, a, position, length", "d = a field of bits of a, with s32 its highest bit as the sign"),
    Row("bfi.b32", "d, a, b, position, length", "d = b with a field of bits replaced by the low bits of a"),
    Row("prmt.b32", "d, a, b, choice", "d = four bytes of a and b, each chosen by four bits"),
    Row("popc.b32", "d, a", "d = how many bits of a are set"),
]
FLOAT_ARITHMETIC = [
    Row(f"add[.rn].{FLOATS}", "d, a, b", "d = a + b, rounded to nearest as all that follow"),
    Row(f"sub[.rn].{FLOATS}", "d, a, b", "d = a - b"),
    Row(f"mul[.rn].{FLOATS}", "d, a, b", "d = a b"),
    Row(f"fma[.rn].{FLOATS}", "d, a, b, c", "d = a b + c, rounded once"),
    Row(f"div[.rn].{FLOATS}", "d, a, b", "d = a / b"),
    Row("div(.full=).f32", "d, a, b", "d = a / b; a GPU may be 2 units in the last place off"),
    Row("sqrt[.rn].f64", "d, a", "d = the square root of a"),
    Row("sqrt(.approx=).ftz.f32", "d, a", "d = the root, denormals taken for zeros; a GPU approximates"),
    Row("rcp.approx.ftz.f64", "d, a", "d = 1 / a, of and in the upper 32 bits of a float64; a GPU approximates"),
    Row(f"neg.{FLOATS}", "d, a", "d = -a"),
    Row(f"abs.{FLOATS}", "d, a", "d = |a|"),
    Row("abs.ftz.f32", "d, a", "d = |a|, zero for a denormal number"),
    Row(f"min.{FLOATS}", "d, a, b", "d = the smaller of a and b, the number where one is NaN"),
    Row(f"max.{FLOATS}", "d, a, b", "d = the larger of a and b, the number where one is NaN"),
    Row("max.NaN.f32", "d, a, b", "d = the larger of a and b, NaN where one is NaN"),
]
COMPARISONS = [
    Row("setp.<eq|ne>.<b16|b32|b64>", "p, a, b", "p = whether a and b are equal, or are not"),
    Row(f"setp.{ORDERS}.{INTEGERS}", "p, a, b", "p = whether a < b, a <= b, a > b, a >= b"),
    Row(f"setp.<eq|ne>.{FLOATS}", "p, a, b", "p = whether a and b are numbers, and equal or not"),
    Row(f"setp.{ORDERS}.{FLOATS}", "p, a, b", "p = whether a and b are numbers, and so ordered"),
    Row(f"setp.<equ|neu|ltu|leu|gtu|geu>.{FLOATS}", "p, a, b", "p = whether they are so, or one of them is NaN"),
    Row(f"setp.<num|nan>.{FLOATS}", "p, a, b", "p = whether both are numbers, or one is NaN"),
    Row("setp.<lt|gt>.<f16|bf16>", "p, a, b", "p = whether a and b are numbers, and so ordered"),
    Row("setp.<lt|gt>.<f16x2|bf16x2>", "{p}, a, b", "p = whether the low halves are so ordered, and the high ones"),
]
CONVERSIONS = [
    Row("cvt.<u32|s32|u64|s64>.<u16|s16>", "d, a", "d = a, widened by zeros or its sign"),
    Row("cvt.<u64|s64>.<u32|s32>", "d, a", "d = a, widened by zeros or its sign"),
    Row("cvt.u16.<u32|u64>", "d, a", "d = the low 16 bits of a"),
    Row("cvt.u32.u64", "d, a", "d = the low 32 bits of a"),
    Row("cvt.rn.<f32|f64>.<u32|s32|u64|s64>", "d, a", "d = the nearest number to a"),
    Row("cvt.f64.f32", "d, a", "d = a"),
    Row("cvt.rn.f32.f64", "d, a", "d = the nearest number to a"),
    Row("cvt.f32.<bf16|f16>", "d, a", "d = a"),
    Row("cvt.rn.<bf16|f16>.f32", "d, a", "d = the nearest number to a, ties to even"),
    Row("cvt.rn.<bf16x2|f16x2>.f32", "d, a, b", "d = the nearest numbers to a, in the high half, and to b"),
]
GLOBAL_MEMORY = [
    Row("ld.global[.v2|.v4].<b8|b16|b32>", "d..., [a]", "d = what is at a, through the first-level cache"),
    Row("ld.global[.v2].b64", "d..., [a]", "the same, of 64 bits"),
    Row("ld.global(.L1::evict_first.L2::cache_hint=)[.v2|.v4].<b16|b32>", "d..., [a], -policy", "the same"),
    Row("ld.global(.L1::evict_first.L2::cache_hint=)[.v2].b64", "d..., [a], -policy", "the same, of 64 bits"),
    Row("ld.global.cg[.v2|.v4].b32", "d..., [a]", "d = what is at a, past the first-level cache"),
    Row("ld.global.cg[.v2].b64", "d..., [a]", "the same, of 64 bits"),
    Row("ld.global.gpu.relaxed.b32", "d, [a]", "d = what is at a, for all programs the same"),
    Row(
        "ld.global.gpu.acquire.b32", "d, [a]", "the same, and what the releasing thread had stored is seen from now on"
    ),
    Row("st.global[.v2|.v4].<b8|b16|b32>", "[a], b...", "at a goes b, some time before a release"),
    Row("st.global[.v2].b64", "[a], b...", "the same, of 64 bits"),
    Row("st.global(.L1::evict_first.L2::cache_hint=)[.v2|.v4].<b16|b32>", "[a], b..., -policy", "the same"),
    Row("st.global(.L1::evict_first.L2::cache_hint=)[.v2].b64", "[a], b..., -policy", "the same, of 64 bits"),
    Row(
        "atom.global.gpu.<relaxed|acquire|release|acq_rel>.add.<u32|u64>",
        "d, [a], b",
        "d = what is at a; there goes d + b",
    ),
    Row("red.global.gpu.<relaxed|release>.add.<u32|u64>", "[a], b", "at a goes what is there + b"),
    Row("atom.global.gpu.<relaxed|acquire|release|acq_rel>.exch.b32", "d, [a], b", "d = what is at a; there goes b"),
    Row("(createpolicy.fractional.L2::evict_first.b64=nothing)", "-policy, 1.0", "how to cache; no result hangs on it"),
]
SHARED_MEMORY = [
    Row("ld.shared[.v2|.v4].<b8|b16|b32>", "d..., [a]", "d = what is at a"),
    Row("ld.shared[.v2].b64", "d..., [a]", "the same, of 64 bits"),
    Row("ld.shared.s32", "d, [a]", "d = what is at a, widened to 64 bits by its sign"),
    Row("st.shared[::cta][.v2|.v4].<b8|b16|b32>", "[a], b...", "at a goes b"),
    Row("st.shared[::cta][.v2].b64", "[a], b...", "the same, of 64 bits"),
    Row("cp.async.<ca|cg>.shared.global", "[d], [a], bytes, given", "from a to d go bytes, or zeros if 0 are given"),
    Row("cp.async.commit_group", "", "this thread's copies since the last group become a group"),
    Row("cp.async.wait_group", "n", "all of this thread's groups but the last n have landed"),
    Row("fence.proxy.async.shared::cta", "", "wgmma sees what was stored before"),
]
WARP = [
    Row("bra[.uni]", "label", "go on at the label"),
    Row("call[.uni]", "function, {-a}", "go on in the function, and come back"),
    Row("ret", "", "go back, or end"),
    Row("trap", "", "the kernel has found an error"),
    Row("bar.sync", "0", "wait until all warps are here"),
    Row("bar.warp.sync", "members", "wait until these lanes of the warp are here"),
    Row("shfl.sync.bfly.b32", "d, a, b, 31, members", "d = a of the lane whose number differs in the bits of b"),
    Row("shfl.sync.idx.b32", "d, a, b, 31, members", "d = a of lane b"),
    Row("redux.sync.<add|min|max>.<s32|u32>", "d, a, members", "d = the sum, least or largest of a over the lanes"),
]
MATRICES = [
    Row("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", "{d}, {a}, {b}, {c}", "D = A B + C in tf32"),
    Row("mma.sync.aligned.m16n8k16.row.col.f32.<bf16.bf16|f16.f16>.f32", "{d}, {a}, {b}, {c}", "the same in 16 bits"),
    Row("mma.sync.aligned.<m8n8k4|m16n8k16>.row.col.f64.f64.f64.f64", "{d}, {a}, {b}, {c}", "D = A B + C in float64"),
    Row("ldmatrix.sync.aligned.m8n8.x4<|.trans>.shared.b16", "{d}, [a]", "d = four matrices of 8 x 8, or transposed"),
    Row("stmatrix.sync.aligned.m8n8.x4.shared.b16", "[a], {b}", "at a go four matrices"),
    Row("wgmma(.mma_async.sync.aligned=.shared).m64n64k16.f32.<bf16.bf16|f16.f16>",
        "{d}, a, b, q, 1, 1, 0, 0", "D = A B, plus D if q; A and B in shared memory"),
    Row("wgmma(.mma_async.sync.aligned=.registers).m64n64k16.f32.<bf16.bf16|f16.f16>",
        "{d}, {a}, b, q, 1, 1, 0", "the same with A in registers"),
    Row("wgmma(.mma_async.sync.aligned=.registers).m64n64k8.f32.tf32.tf32", "{d}, {a}, b, q, 1, 1", "the same in tf32"),
    Row("wgmma.fence.sync.aligned", "", "wgmma may use registers written before"),
    Row("wgmma.commit_group.sync.aligned", "", "the products since the last group become a group"),
    Row("wgmma.wait_group.sync.aligned", "n", "all groups but the last n are done"),
]  # fmt: skip
TABLE = [
    *MOVES,
    *INTEGER_ARITHMETIC,
    *BITS,
    *FLOAT_ARITHMETIC,
    *COMPARISONS,
    *CONVERSIONS,
    *GLOBAL_MEMORY,
    *SHARED_MEMORY,
    *WARP,
    *MATRICES,
]


def spellings(row: Row) -> dict[str, str]:
    """Return every opcode that a row stands for, with the operation of the core that carries it out."""
    choices: list[list[tuple[str, str]]] = []
    for one_of, may_be, spelled, called, plain in re.findall(
        r"<([^>]*)>|\[([^]]*)\]|\(([^=]*)=([^)]*)\)|([^<[(]+)", row.form
    ):
        if one_of:
            choices.append([(choice, choice) for choice in one_of.split("|")])
        elif may_be:
            choices.append([("", ""), *((choice, "") for choice in may_be.split("|"))])
        else:
            choices.append([(spelled, called)] if spelled else [(plain, plain)])
    return {"".join(s for s, _ in parts): "".join(c for _, c in parts) for parts in product(*choices)}


class Form(NamedTuple):
    """One opcode, with one kind of operands."""

    row: Row
    operation: str


def _forms() -> dict[str, list[Form]]:
    forms: dict[str, list[Form]] = {}
    for row in TABLE:
        for opcode, operation in spellings(row).items():
            forms.setdefault(opcode, []).append(Form(row, operation))
    return forms


FORMS = _forms()
"""The forms of each opcode."""


def find(statement: Statement) -> Form:
    """Return the form of a statement.

    Raises:
        PtxError: the table has none; the message names the instruction and its line.
    """
    forms = FORMS.get(statement.opcode)
    if forms is None:
        raise PtxError(f"line {statement.line}: unknown instruction {statement.opcode}")
    for form in forms:
        kinds = form.row.kinds
        if len(kinds) == len(statement.operands) and all(map(_fits, kinds, statement.operands)):
            return form
    raise PtxError(f"line {statement.line}: unknown operands of {statement.opcode}: {statement.operands}")


def _fits(kind: str, operand: Operand) -> bool:
    if kind[0].isdigit():
        return operand == kind
    if kind.startswith("["):
        return isinstance(operand, Address)
    if kind.startswith("{"):
        return isinstance(operand, tuple) and not isinstance(operand, Address)
    return isinstance(operand, str) or (kind.endswith("...") and not isinstance(operand, Address))
