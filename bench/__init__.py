"""Benchmarks: ours, the ways people do it now, and the physical limit, in one run."""
