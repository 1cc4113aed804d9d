"""``python -m bench methods``: the time of every method's weights, and of a whole aggregation, beside TorchJD's."""
