"""A step from losses to its update: source, rows, Gramian, weights, sink."""
