"""Steps replayed as CUDA graphs: one launch a frame in the place of some hundred.

Recorded once for each bucket of columns that the cache reads (`GraphCache`). On other devices the same fixed-shape
step runs without recording; the tests compare it with the plain one.
Source: PyTorch's CUDA graphs (https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs/).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from valle.modules.cache import GraphCache

WARM_UP = 3  # runs before recording, as CUDA's libraries allocate at their first


class GraphedStep:
    """codes (A,) -> logits (A, V + 1) of the frame behind them.

    Args:
        step: computes that over `cache`, for all rows the cache began with.
        cache: advances by one frame a call.
    """

    def __init__(self, step: Callable[[Tensor], Tensor], cache: GraphCache) -> None:
        self._step, self._cache = step, cache
        self._tokens = torch.zeros(cache.rows, dtype=torch.long, device=cache.column.device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, tokens: Tensor) -> Tensor:
        rows = len(tokens)
        self._tokens[:rows] = tokens
        self._cache.advance()
        if self._tokens.device.type != "cuda":
            return self._step(self._tokens)[:rows]
        if self._cache.bucket not in self._graphs:
            self._graphs[self._cache.bucket] = self._record()
        graph, logits = self._graphs[self._cache.bucket]
        graph.replay()
        return logits[:rows].clone()

    def _record(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # Running a step again changes nothing: it writes the same frame into the same column.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._step(self._tokens)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._step(self._tokens)
        return graph, logits
