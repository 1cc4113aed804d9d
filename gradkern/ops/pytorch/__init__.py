"""The PyTorch back end serves the CPU, and any device that has no kernels of its own."""
