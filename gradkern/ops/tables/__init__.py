"""Tables of measured settings: whose they are, where they lie, what they may hold, and which one serves a device.

``gradkern tune`` (``gradkern/tuning``) writes them. A process reads one at its first launch on a device.

- ``candidates`` lists what a table may choose from, and so what a file can do.
- ``card`` and ``places`` say for whom a table is, and its file.
- ``table`` writes and checks the text, ``reading`` finds the table that serves a device.
"""
