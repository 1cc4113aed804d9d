"""GradAttention, the one method that reads entries of the gradients besides their Gramian."""

from gradkern.aggregators.attention.grad_attention import GradAttention

__all__ = ["GradAttention"]
