"""The core's functions and structures, as ``core/interface.cpp`` declares them."""

import ctypes
from ctypes import POINTER, Structure, c_char_p, c_int32, c_int64, c_uint64, c_void_p
from functools import cache

from tests.ptx import build


class Trap(Exception):
    """A kernel did what a GPU would not do, or what no kernel may do."""


class EncodedInstruction(Structure):
    _fields_ = [
        (name, c_int32)
        for name in ("operation", "line", "guard", "guarded_by_false", "target", "n_outputs", "n_inputs")
    ]


class EncodedCode(Structure):
    _fields_ = [
        ("instructions", POINTER(EncodedInstruction)),
        ("operands", POINTER(c_int32)),
        ("constants", POINTER(c_uint64)),
        ("operations", POINTER(c_char_p)),
        ("n_instructions", c_int32),
        ("n_operands", c_int32),
        ("n_constants", c_int32),
        ("n_registers", c_int32),
        ("n_threads", c_int32),
        ("shared_bytes", c_int32),
    ]


class StartRegisters(Structure):
    _fields_ = [("thread", c_int32), ("lane", c_int32), ("program", c_int32 * 3), ("grid", c_int32 * 3)]


class ParameterValue(Structure):
    _fields_ = [("register", c_int32), ("value", c_uint64)]


class Grid(Structure):
    _fields_ = [("size", c_uint64 * 3)]


class Range(Structure):
    _fields_ = [("begin", c_uint64), ("end", c_uint64)]


class Settings(Structure):
    """How a grid runs; ``core/scheduler.h`` says what each means."""

    _fields_ = [
        ("at_once", c_int32),
        ("multiprocessors", c_int32),
        ("turn", c_int32),
        ("weak", c_int32),
        ("ordered", c_int32),
        ("seed", c_uint64),
        ("patience", c_uint64),
    ]


@cache
def core() -> ctypes.CDLL:
    """Return the core, compiled if need be."""
    library = ctypes.CDLL(str(build.library()))
    library.has_operation.argtypes = [c_char_p]
    library.make_code.argtypes = [POINTER(EncodedCode)]
    library.make_code.restype = c_void_p
    library.free_code.argtypes = [c_void_p]
    library.run_code.argtypes = [
        c_void_p,
        c_int32,
        POINTER(StartRegisters),
        POINTER(ParameterValue),
        c_int32,
        POINTER(Grid),
        POINTER(Range),
        c_int32,
        POINTER(Settings),
        c_char_p,
        c_int32,
    ]
    library.run_code.restype = c_int64
    return library
