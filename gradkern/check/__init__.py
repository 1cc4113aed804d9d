"""The self-check: it compares every operator on every device with :mod:`gradkern.reference`."""
