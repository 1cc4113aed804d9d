"""Advice on the way of a step: what each way costs on a user's own losses, and which one to take.

- ``ways.py`` has the ways, and what is known of each without running it.
- ``rehearsal.py`` runs a step up to where it would write, and plain training's backward pass.
- ``seconds.py`` and ``memory.py`` measure such runs.
- ``advice.py`` has the result and the choice, and ``table.py`` its text.
"""
