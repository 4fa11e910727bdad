"""Where CUDA graphs are captured."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class GraphRoom:
    """One CUDA stream and one pool of memory for graphs of which no two are in use at once: each is laid over what the
    others compute."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def capturing(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        """Around calls that are recorded into `graph` and not run. Other threads may use the GPU meanwhile."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                yield
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
