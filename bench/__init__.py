"""Benchmarks: ours, the ways people do it now, and the physical limit, measured in turn in one run."""

import os

# Before torch is imported. Else PyTorch's profiler, which counts memory, writes lines of its own between ours.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
