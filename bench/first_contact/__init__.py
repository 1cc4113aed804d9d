"""``python -m bench.first_contact``: the first nine minutes with a GPU, in one command.

The command itself imports no torch. Each step is a child process, so that neither a crash nor a hanging kernel ends
more than its step. See "First contact" in ``bench/NOTES.md``.
"""
