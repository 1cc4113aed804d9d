"""Benchmarks of gradkern, of common implementations and of the bandwidth limit, measured in turn in one run."""

import os

# These are set before torch is imported. Otherwise PyTorch's profiler, which counts memory, prints its own log lines.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
