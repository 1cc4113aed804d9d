"""A step as a CUDA graph."""

from collections.abc import Callable

import torch


class Captured:
    """A step that is captured at the first call and replayed at every call. Capturing raises if it is impossible."""

    def __init__(self, step: Callable[[], object]) -> None:
        self.step = step
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Run the step."""
        if self.graph is None:
            self.graph = self._capture()
        self.graph.replay()

    def _capture(self) -> torch.cuda.CUDAGraph:
        here, stream, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(here)
        with torch.cuda.stream(stream):  # torch requires a run on that stream before the capture
            self.step()
        here.wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            self.step()
        return graph
