"""The Triton back end: it serves CUDA and ROCm devices.

Its functions take any tensors that Triton can launch on, so the interpreter runs them on CPU tensors. No function reads
the device: layouts follow from shapes, addresses from ``data_ptr``.
"""

from gradkern.ops.triton.backend import BACKEND

if BACKEND.unavailable is None:
    try:
        from gradkern.ops.one_launch import surgery  # noqa: F401  (registers)
        from gradkern.ops.triton import adamw, combine, entries, entrywise, gramian, methods, solvers  # noqa: F401  (register)
    except ImportError as error:  # not every platform has Triton, and Triton may fail to load
        BACKEND.unavailable = f"Triton cannot be imported ({error})"
