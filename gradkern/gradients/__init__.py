"""The sources of task gradients: losses, features that tasks share, sums of micro-batches, remembered steps."""
