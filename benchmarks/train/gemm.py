"""The machine's own matrix-product peak, through torch: what a perfect program could reach here."""

import time
from typing import Any, Final

SHAPES: Final = ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 2048, 2048), (1536, 576, 1536), (1536, 1536, 576))
"""(rows, inner, columns); the last two are an MLP's of SmolLM2-135M over a batch of 8."""


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Per dtype, the best operations per second over the shapes, a multiply-add as two, and the shape that gave it."""
    import torch

    best: dict[str, Any] = {}
    for name in ("float32", "bfloat16"):
        rates = {}
        for rows, inner, columns in SHAPES:
            a = torch.randn(rows, inner).to(getattr(torch, name))
            b = torch.randn(columns, inner).to(getattr(torch, name))
            seconds = _best_s(lambda a=a, b=b: torch.nn.functional.linear(a, b), budget_s=request["budget_s"])
            rates[f"{rows} x {inner} x {columns}"] = 2 * rows * inner * columns / seconds
        shape = max(rates, key=rates.__getitem__)
        best[name] = {"flops_per_second": rates[shape], "shape": shape}
    return best


def _best_s(call: Any, *, budget_s: float) -> float:
    call()
    times = []
    end_s = time.perf_counter() + budget_s
    while not times or time.perf_counter() < end_s:
        started_s = time.perf_counter()
        call()
        times.append(time.perf_counter() - started_s)
    return min(times)
