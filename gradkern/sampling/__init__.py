"""Samplers that choose the tasks of each training step."""

from gradkern.sampling.sampler import SCHEMES, TaskSampler

__all__ = ["SCHEMES", "TaskSampler"]
