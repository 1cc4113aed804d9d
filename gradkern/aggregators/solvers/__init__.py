"""Small problems over tasks, solved for many Gramians at once on their device, without a read by the host.

- ``active_set``: convex quadratic problems with bounds, by primal-dual active sets.
- ``min_norm``: the shortest vector of a convex hull.
- ``ball``: the vector in a ball whose least dot product with a row is the largest.
- ``fair``: weights with M w = (s / w)^(1/α), by Newton's method.
- ``eigen``: eigenvalues, and pseudo-inverses over the numerical rank.

Each is a function of arrays, NumPy's or tensors (``arrays``), and has its residual beside it. A method writes its own
formula as such a function, and makes it one of tensors by ``arrays.carried``. ``scaling`` has what they share: rows of
very different lengths, zero rows, tasks that are absent, and entries that are not finite.
"""
