"""The self-check: every operator on every device beside :mod:`gradkern.reference`."""
