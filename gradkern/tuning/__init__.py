"""Measured settings: ``gradkern tune`` writes a table for a card, and later processes read it.

- ``candidates`` lists what a table may choose from, and so what a file can do.
- ``card``, ``places``, ``table`` and ``reading`` say whose table it is, where it lies, what is in it, and which one
  serves a device. Only these run in a training process, at the first launch on a device.
- ``subjects`` says how each kernel is checked and run, on the rows of ``inputs``. ``contest`` times candidates in
  rounds and decides, ``sizes`` does so for the one launch, and ``tune`` goes through all of them within its time.
- ``command`` is the command line's part, with ``progress`` and ``report``.
"""
