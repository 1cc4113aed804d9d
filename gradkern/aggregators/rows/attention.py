"""The method that learns its weights from entries of the gradients."""

from gradkern.aggregators.attention.grad_attention import GradAttention
from gradkern.aggregators.method import Laws, Method, Paper

GRADATTENTION = Paper(None, None, "GradAttention: Attention-Based Gradient Surgery")

ROWS = (
    Method(
        "gradattention",
        GradAttention,
        "gradattention_updates",
        GRADATTENTION,
        Laws(invariant="weights", no_conflict="mean"),
        draws="entries",
        state=True,
    ),
)
