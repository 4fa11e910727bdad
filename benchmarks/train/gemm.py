"""The machine's own matrix-product peak, through torch: what a perfect program could reach here."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

SHAPES: Final = ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 2048, 2048), (1536, 576, 1536), (1536, 1536, 576))
"""(rows, inner, columns); the last two are an MLP's of SmolLM2-135M over a batch of 8."""
LARGE: Final = ((8192, 8192, 8192),)


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Per dtype, the best operations per second over the shapes, a multiply-add as two, and the shape that gave it."""
    import torch

    device = request["plan"]["device"]

    def done() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    best: dict[str, Any] = {}
    for name in ("float32", "bfloat16"):
        rates = {}
        for rows, inner, columns in SHAPES + (LARGE if device == "cuda" else ()):
            a = torch.randn(rows, inner, device=device).to(getattr(torch, name))
            b = torch.randn(columns, inner, device=device).to(getattr(torch, name))
            call = partial(torch.nn.functional.linear, a, b)
            seconds = _best_s(call, done, repeat=10 if device == "cuda" else 1, budget_s=request["budget_s"])
            rates[f"{rows} x {inner} x {columns}"] = 2 * rows * inner * columns / seconds
        shape = max(rates, key=rates.__getitem__)
        best[name] = {"flops_per_second": rates[shape], "shape": shape}
    return best


def _best_s(call: Callable[[], Any], done: Callable[[], None], *, repeat: int, budget_s: float) -> float:
    call()
    done()
    times = []
    end_s = time.perf_counter() + budget_s
    while not times or time.perf_counter() < end_s:
        started_s = time.perf_counter()
        for _ in range(repeat):
            call()
        done()
        times.append((time.perf_counter() - started_s) / repeat)
    return min(times)
