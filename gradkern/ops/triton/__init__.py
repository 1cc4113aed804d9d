"""The Triton back end: it serves CUDA and ROCm devices.

Its functions take any tensors that Triton can launch on, so that the interpreter runs them on CPU tensors. Nothing here
reads the device: layouts come from shapes, addresses from ``data_ptr``.
"""

from gradkern.ops.triton.backend import BACKEND

if BACKEND.unavailable is None:
    try:
        from gradkern.ops.one_launch import surgery  # noqa: F401  (registers)
        from gradkern.ops.triton import adamw, combine, entries, gramian, methods  # noqa: F401  (register)
    except ImportError as error:  # Triton does not exist for every platform, and one that exists may not load
        BACKEND.unavailable = f"Triton cannot be imported ({error})"
