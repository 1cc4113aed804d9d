"""Gramians from what went into each layer and what comes back out of it, without task gradients."""
