"""Steps on several ranks of torch.distributed, each with a part of the batch.

Row t of a step is the mean over the ranks of their gradients of task t. It is never whole anywhere: each rank holds one
shard of every row, and computes dot products and combination of these shards.

- ``comm`` holds the collectives, and finds the ranks of a step.
- ``agreement`` lets all ranks raise if one of them cannot take the step, or takes another one.
- ``refused`` finds wrappers of a model that reduce gradients in their own way.
- ``buckets`` says where each parameter lies in the flat memory that is cut into shards.
- ``reduction`` is the hook after the rows: it makes shards of them, one task's while the next task's backward runs.
- ``Comm.summed`` is the hook after the Gramian: it adds up the dot products of all ranks' shards.

DTensors need no reduction: torch's own backward passes leave shards of the means (``gradkern.step.on_parts``).

On one rank there is no :class:`Comm`, and nothing of this runs.
"""
