"""The methods that combine the task gradients entry by entry."""
