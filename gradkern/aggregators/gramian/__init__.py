"""Methods whose weights solve a small problem posed by the Gramian."""
