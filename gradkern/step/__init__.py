"""A step from losses to the update.

- The source gives each task's gradients, by one backward pass after another.
- The rows are these gradients, a row for each of T tasks.
- The Gramian holds every dot product of two rows.
- The weights are what the method makes of the Gramian.
- The sink takes the rows' combination with these weights: to ``.grad``, or right to an optimizer's step.
"""
