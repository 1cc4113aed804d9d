"""``gradkern tune``: it measures settings and writes a table for a card, which later processes read (``ops/tables``).

- ``subjects`` says how each kernel is checked and run, on the rows of ``inputs``.
- ``contest`` times candidates in rounds and decides, ``sizes`` does so for the one launch, by the ``clock``. ``tune``
  goes through all of them within its time; ``compiling`` builds their kernels first, and ``forced`` puts one in place.
- ``command`` is the command line's part, with ``progress`` and ``report``.
"""
