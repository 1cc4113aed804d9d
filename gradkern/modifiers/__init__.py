"""Modifiers change a step beside any method: gradient suppression and the learning rate by conflict."""
