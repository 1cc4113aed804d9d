"""A step from losses to the update: source, rows, Gramian, weights, sink."""
