"""The kinds of rows that a step may have."""

from gradkern.step.activation_rows import ActivationRows
from gradkern.step.flat_rows import FlatRows
from gradkern.step.rows import Rows

StepRows = Rows | FlatRows | ActivationRows
"""The rows of a step."""
