"""PEFT's mixed batches and a merged model, both by Transformers' generate: one left-padded batch at a time."""

import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.serve import loads
from benchmarks.serve.data import adapter_path, read_prompts
from benchmarks.serve.plan import SCENARIOS, Plan, Row, pairs
from benchmarks.train.meter import peak_bytes


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """The row's answers as token ids, or its tokens per second of each scenario."""
    plan, row, work = Plan(**request["plan"]), Row.from_json(request["row"]), Path(request["work"])
    prompts = read_prompts(work)
    scenarios = {name: pairs(SCENARIOS[name], prompts) for name in row.scenarios}
    names = sorted({adapter for asked in scenarios.values() for _, adapter in asked if adapter})
    make = _merged if row.program == "merged" else _mixed
    model = make(work, names, row.dtype).to(plan.device).eval()
    model.generation_config.eos_token_id = None  # nobody stops early

    def generate(asked: list[tuple[list[int], str | None]], new_tokens: int) -> list[list[int]]:
        adapters = {"adapter_names": [adapter or "__base__" for _, adapter in asked]} if row.program == "peft" else {}
        ids_BT, mask_BT = _left_padded([ids for ids, _ in asked], plan.device)
        whole_BT = model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=0,
            **adapters,
        )
        return whole_BT[:, ids_BT.shape[1] :].tolist()

    def seconds(asked: list[tuple[list[int], str | None]]) -> float:
        started_s = time.perf_counter()
        answers = generate(asked, plan.new_tokens)
        took_s = time.perf_counter() - started_s
        assert {len(answer) for answer in answers} == {plan.new_tokens}, "not every answer is whole"
        return took_s

    if request["mode"] == "answers":
        return {"answers": {name: generate(asked, plan.new_tokens) for name, asked in scenarios.items()}}
    rates, all_seconds = {}, {}
    for name, asked in scenarios.items():
        generate(asked, 8)
        all_seconds[name] = loads.timed(lambda asked=asked: seconds(asked), plan)
        rates[name] = len(asked) * plan.new_tokens / median(all_seconds[name])
    return {"dtype": row.dtype, "rates": rates, "seconds": all_seconds, "peak_bytes": peak_bytes(plan.device)}


def _mixed(work: Path, names: list[str], dtype: str) -> Any:
    """PEFT's model with all adapters, which are kept in the base's dtype: as fp32 beside bf16 they would cost casts."""
    from peft import PeftModel

    first, *others = names
    model = PeftModel.from_pretrained(
        _base(work, dtype), adapter_path(work, first), adapter_name=first, autocast_adapter_dtype=False
    )
    for name in others:
        model.load_adapter(adapter_path(work, name), adapter_name=name, autocast_adapter_dtype=False)
    return model


def _merged(work: Path, names: list[str], dtype: str) -> Any:
    """The base with one adapter added to its weights, in fp32 and then rounded."""
    import torch
    from peft import PeftModel

    [name] = names
    model = PeftModel.from_pretrained(_base(work, "float32"), adapter_path(work, name)).merge_and_unload()
    return model.to(getattr(torch, dtype))


def _base(work: Path, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(work / "base", dtype=getattr(torch, dtype))


def _left_padded(prompts: list[list[int]], device: str) -> tuple[Any, Any]:
    """(Token ids, mask), both (B, T): generate() needs every prompt to end in the last column."""
    import torch

    longest = max(len(ids) for ids in prompts)
    rows = [[0] * (longest - len(ids)) + ids for ids in prompts]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    return torch.tensor(rows, device=device), torch.tensor(mask, device=device)
