"""PTX text as Triton writes it: what of it is a statement, and how its operands read."""

import pytest

from tests.ptx.parse import Address, Guard, Parameter, PtxError, Statement, parse

TEXT = """\
//
.version 8.7
.target sm_90a
.func helper(
	.param .b64 helper_param_0,
	.param .b32 helper_param_1
)
;
.extern .shared .align 16 .b8 global_smem[];
	// .globl	some_kernel          // -- Begin function some_kernel
.visible .entry some_kernel(
	.param .u64 .ptr .global .align 1 some_kernel_param_0,
	.param .f64 some_kernel_param_1
)
.reqntid 128
{
	.reg .pred 	%p<87>;
	.loc	1 31 0                          // some.py:31:0
$L__func_begin0:
	ld.param.b64 	%rd1, [some_kernel_param_0];
	// begin inline asm
	mov.u32 %r18, 0x0;
	@%p1 atom.global.gpu.relaxed.add.u32 %r18, [ %rd1 + 0 ], %r19;
	// end inline asm
	{ .reg .b32 tmp; mov.b64 {tmp, %r271}, %rd5; }
	ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + -16 ];
	@!%p2 bra 	$L__BB0_1;
	.loc	2 26 44, function_name $L__info_string0, inlined_at 1 78 25
	{ // callseq 0, 0
	.param .b64 param0;
	st.param.b64 	[param0], %rd2;
	call.uni helper, (param0, param1);
	} // callseq 0
$L__BB0_1:                             // %exit
	wgmma.mma_async.sync.aligned.m64n64k8.f32.tf32.tf32 {%r1,%r2},
		{%r3, %r4}, %rd3, %p1, 1, 1;
	setp.lt.bf16x2 	%p1|%p2, %r1, %r2;
	.pragma "nounroll";
	ret;
$L__tmp7:
}
.func helper(
	.param .b64 helper_param_0,
	.param .b32 helper_param_1
)                                       // -- Begin function helper
{
	ret;
}
	.section	.debug_macinfo	{	}
"""


def test_functions() -> None:
    module = parse(TEXT)
    assert module.n_threads == 128
    assert list(module.functions) == ["some_kernel", "helper"]
    assert module.kernel.name == "some_kernel"
    assert module.kernel.parameters == [
        Parameter("some_kernel_param_0", "u64"),
        Parameter("some_kernel_param_1", "f64"),
    ]
    helper = module.functions["helper"]
    assert not helper.entry
    assert [parameter.type for parameter in helper.parameters] == ["b64", "b32"]
    assert [statement.opcode for statement in helper.statements] == ["ret"]


def test_statements() -> None:
    wgmma = "wgmma.mma_async.sync.aligned.m64n64k8.f32.tf32.tf32"
    assert parse(TEXT).kernel.statements == [
        Statement(20, None, "ld.param.b64", ("%rd1", Address("some_kernel_param_0", "0"))),
        Statement(22, None, "mov.u32", ("%r18", "0x0")),
        Statement(23, Guard("%p1", False), "atom.global.gpu.relaxed.add.u32", ("%r18", Address("%rd1", "0"), "%r19")),
        Statement(25, None, "mov.b64", (("tmp", "%r271"), "%rd5")),
        Statement(26, None, "ld.global.v4.b32", (("%r1", "%r2", "%r3", "%r4"), Address("%rd1", "-16"))),
        Statement(27, Guard("%p2", True), "bra", ("$L__BB0_1",)),
        Statement(31, None, "st.param.b64", (Address("param0", "0"), "%rd2")),
        Statement(32, None, "call.uni", ("helper", ("param0", "param1"))),
        Statement(35, None, wgmma, (("%r1", "%r2"), ("%r3", "%r4"), "%rd3", "%p1", "1", "1")),
        Statement(37, None, "setp.lt.bf16x2", (("%p1", "%p2"), "%r1", "%r2")),
        Statement(39, None, "ret", ()),
    ]


def test_labels() -> None:
    assert parse(TEXT).kernel.labels == {"$L__func_begin0": 0, "$L__BB0_1": 8, "$L__tmp7": 11}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ret;", "k does not end"),
        ("ld.global.b32 %r1, [%rd1 - 4]; }", "line 1: no address"),
        ("=; }", "line 1: no statement"),
    ],
)
def test_what_cannot_be_read(body: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        parse(f".visible .entry k() .reqntid 32 {{ {body}")
