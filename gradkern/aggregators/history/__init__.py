"""Methods on running means of the task gradients, which they keep: T rows of P numbers."""
