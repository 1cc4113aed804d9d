"""``python -m bench.step --shared``: a step whose tasks share one forward pass, in every way to take it."""
