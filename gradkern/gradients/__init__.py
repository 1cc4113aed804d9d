"""The sources of task gradients: losses, shared features, sums of micro-batches, and memory."""
