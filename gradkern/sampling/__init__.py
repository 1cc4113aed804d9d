"""Which task trains next."""

from gradkern.sampling.sampler import SCHEMES, TaskSampler

__all__ = ["SCHEMES", "TaskSampler"]
