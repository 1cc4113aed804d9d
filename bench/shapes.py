"""The parameter lists whose gradients are left in place."""

from math import prod

PIECES = 16
Shape = tuple[int, ...]


def bert(vocabulary: int, positions: int, hidden: int, layers: int, inner: int) -> list[Shape]:
    """Return the shapes of a BERT encoder's parameters (Devlin et al. 2019), in the order of public implementations."""
    norm: list[Shape] = [(hidden,), (hidden,)]

    def linear(into: int, out: int) -> list[Shape]:
        return [(out, into), (out,)]

    embeddings = [(vocabulary, hidden), (positions, hidden), (2, hidden), *norm]  # 2 kinds of segments
    query_key_value_output = 4 * linear(hidden, hidden)
    layer = [*query_key_value_output, *norm, *linear(hidden, inner), *linear(inner, hidden), *norm]
    pooler = linear(hidden, hidden)
    return [*embeddings, *layers * layer, *pooler]


BERT_BASE = bert(vocabulary=30522, positions=512, hidden=768, layers=12, inner=3072)


def numbers(shapes: list[Shape]) -> int:
    """Return P, the number of elements in tensors of these shapes."""
    return sum(map(prod, shapes))


def pieces(P: int) -> list[Shape]:
    """Return the shapes of vectors with P elements in all, of equal length up to rounding."""
    return [((k + 1) * P // PIECES - k * P // PIECES,) for k in range(PIECES)]
