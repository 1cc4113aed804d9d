"""The three operations on task gradients: Gramian, combination, projection."""

from gradkern.ops.backends import backend
from gradkern.ops.matrix import combine, gramian, project

__all__ = ["backend", "combine", "gramian", "project"]
