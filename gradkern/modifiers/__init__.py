"""Modifiers of a step that work with any method: gradient suppression and the learning rate by conflict."""
