"""vLLM's CPU build, in its own environment: all requests at once, and open-loop arrivals.

This file runs without lorad's packages. Everything that makes vLLM faster here and leaves its answers alone is on.
"""

import asyncio
import glob
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.processes import ROOT
from benchmarks.serve import loads
from benchmarks.serve.data import adapter_path, read_prompts
from benchmarks.serve.loads import Heard
from benchmarks.serve.plan import FAMILIES, SCENARIOS, Plan, Row, pairs

ENVIRONMENT = ROOT / ".venv-vllm"


def variables(threads: int) -> dict[str, str]:
    """Its environment: bound to the cores it may use, room for the KV cache, tcmalloc where it was found."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    allocator = sorted(glob.glob(str(ENVIRONMENT / "tcmalloc" / "**" / "libtcmalloc_minimal.so.4"), recursive=True))
    return {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        **({"LD_PRELOAD": allocator[0]} if allocator else {}),
    }


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """The row's answers as token ids, or its tokens per second of each scenario."""
    from vllm import LLM, SamplingParams

    plan, row, work = Plan(**request["plan"]), Row.from_json(request["row"]), Path(request["work"])
    prompts = read_prompts(work)
    scenarios = {name: pairs(SCENARIOS[name], prompts) for name in row.scenarios}
    llm = LLM(**_options(plan, row.dtype, work, row.scenarios))

    def generate(asked: list[tuple[list[int], str | None]], new_tokens: int) -> list[list[int]]:
        answers = llm.generate(
            [{"prompt_token_ids": ids} for ids, _ in asked],
            SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=True),
            lora_request=[_lora(work, adapter) for _, adapter in asked],
            use_tqdm=False,
        )
        return [list(answer.outputs[0].token_ids) for answer in answers]

    def seconds(asked: list[tuple[list[int], str | None]]) -> float:
        started_s = time.perf_counter()
        answers = generate(asked, plan.new_tokens)
        took_s = time.perf_counter() - started_s
        assert {len(answer) for answer in answers} == {plan.new_tokens}, "not every answer is whole"
        return took_s

    try:
        if request["mode"] == "answers":
            return {"answers": {name: generate(asked, plan.new_tokens) for name, asked in scenarios.items()}}
        rates, all_seconds = {}, {}
        for name, asked in scenarios.items():
            generate(asked, 8)
            all_seconds[name] = loads.timed(lambda asked=asked: seconds(asked), plan)
            rates[name] = len(asked) * plan.new_tokens / median(all_seconds[name])
        return {"dtype": row.dtype, "rates": rates, "seconds": all_seconds}
    finally:
        llm.llm_engine.engine_core.shutdown()


def measure_open(request: dict[str, Any]) -> dict[str, Any]:
    """Latencies at each rate of arrivals, over the adapters of the scenario `eight`, by vLLM's own async engine."""
    plan, row, work = Plan(**request["plan"]), Row.from_json(request["row"]), Path(request["work"])
    asked = pairs(SCENARIOS["eight"], read_prompts(work))
    found = asyncio.run(_open_loop(plan, row, work, asked, request["number"]))
    return {"dtype": row.dtype, "rates": {}, "open": found}


async def _open_loop(
    plan: Plan, row: Row, work: Path, asked: list[tuple[list[int], str | None]], number: int
) -> dict[str, Any]:
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**_options(plan, row.dtype, work, ("eight",))))

    async def ask(k: int, name: str, due_s: float, new_tokens: int) -> Heard:
        await asyncio.sleep(due_s - time.perf_counter())
        prompt, adapter = asked[k % len(asked)]
        heard = Heard(due_s)
        params = SamplingParams(
            temperature=0, max_tokens=new_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        async for piece in engine.generate(
            {"prompt_token_ids": prompt}, params, name, lora_request=_lora(work, adapter)
        ):
            if num_tokens := len(piece.outputs[0].token_ids):
                heard.came_s.append(time.perf_counter())
                heard.num_tokens += num_tokens
        assert heard.num_tokens == new_tokens, "the answer is not whole"
        return heard

    try:
        await asyncio.gather(*(ask(k, f"warm-{k}", time.perf_counter(), 8) for k in range(len(asked))))
        found = {}
        for rate in plan.rates:
            arrivals = loads.poisson_arrivals(rate, seconds=plan.open_s, seed=plan.seed + number)
            start_s = time.perf_counter()
            heard = await asyncio.gather(
                *(ask(k, f"{rate:g}-{k}", start_s + arrival_s, plan.new_tokens) for k, arrival_s in enumerate(arrivals))
            )
            found[f"{rate:g}"] = loads.latencies(heard)
            if loads.has_fallen_behind(found[f"{rate:g}"]):
                break
        return found
    finally:
        engine.shutdown()


def _options(plan: Plan, dtype: str, work: Path, scenarios: tuple[str, ...]) -> dict[str, Any]:
    """Engine arguments. With adapters: room for just those of the scenarios, on just the modules that they update.

    Prefix caching is off, since the benchmark asks the same prompts again and again and users do not.
    """
    options: dict[str, Any] = {
        "model": str(work / "base"),
        "dtype": dtype,
        "max_model_len": 1024,
        "max_num_seqs": plan.num_prompts,
        "enable_prefix_caching": False,
        "seed": 0,
    }
    used = [SCENARIOS[name] for name in scenarios if SCENARIOS[name].count]
    if not used:
        return options
    count, rank = max(scenario.count for scenario in used), max(scenario.max_rank for scenario in used)
    targets = FAMILIES[used[0].family].targets
    return {
        **options,
        "enable_lora": True,
        "max_loras": count,
        "max_cpu_loras": count,
        "max_lora_rank": rank,
        "lora_target_modules": None if targets == "all-linear" else list(targets),
    }


def _lora(work: Path, adapter: str | None) -> Any:
    from vllm.lora.request import LoRARequest

    if adapter is None:
        return None
    family, number = adapter.split("-")
    return LoRARequest(
        adapter, 1 + 10_000 * list(FAMILIES).index(family) + int(number), str(adapter_path(work, adapter))
    )
