"""``python -m bench.step``: a whole training step, by gradkern, by other libraries, and with no surgery at all."""
