"""A step as a CUDA graph."""

from collections.abc import Callable

import torch


class Captured:
    """Captures a step when first called, which raises where it cannot be captured, and replays it at every call."""

    def __init__(self, step: Callable[[], object]) -> None:
        self.step = step
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """The step, once more."""
        if self.graph is None:
            self.graph = self._capture()
        self.graph.replay()

    def _capture(self) -> torch.cuda.CUDAGraph:
        here, stream, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(here)
        with torch.cuda.stream(stream):  # once on that stream, as torch asks for
            self.step()
        here.wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            self.step()
        return graph
