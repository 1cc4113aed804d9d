"""The three operations on task gradients: Gramian, combination, projection."""

from gradkern.ops.matrix import combine, gramian, project  # isort: skip  (declares the operators)
from gradkern.ops.backends import backend

__all__ = ["backend", "combine", "gramian", "project"]
