"""``python -m bench.step``: a whole training step with gradkern, with other libraries, and without surgery."""
