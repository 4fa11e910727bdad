"""The one judge of all answers: the model that an adapter makes when it is merged into the base, in fp32 and alone."""

import copy
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.serve.data import adapter_path, read_prompts
from benchmarks.serve.plan import SCENARIOS, Plan


def judge(request: dict[str, Any]) -> dict[str, Any]:
    """Row -> scenario -> {share, gap, exact, answers}, of what is in the file `answers`; and `crossed`, the opposite.

    Given the prompt and the tokens of an answer up to some place, the judge has a choice of its own for the next: its
    likeliest one. `share` is the share of all tokens that are that choice; `gap` the most by which a token was less
    likely than that choice, in nats; `answers` the number of answers, and `exact` of those that are the judge's greedy
    ones: by induction, those without a token that it would not have chosen. `crossed` is the share for the answers of
    the rows `crossed_rows`, told by the model of the next request's adapter, or by the base if there is one adapter.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plan, work = Plan(**request["plan"]), Path(request["work"])
    answers: dict[str, dict[str, list[list[int]]]] = json.loads(Path(request["answers"]).read_text())
    prompts = read_prompts(work)
    base = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.float32).to(plan.device).eval()

    asked: dict[str | None, list[tuple[str, str, str, int]]] = defaultdict(list)
    for row, scenarios in answers.items():
        for name in scenarios:
            for number in range(len(prompts)):
                asked[SCENARIOS[name].adapter(number)].append((row, row, name, number))
                if row in request["crossed_rows"] and SCENARIOS[name].count:
                    other = SCENARIOS[name].adapter(number, shift=1) if SCENARIOS[name].count > 1 else None
                    asked[other].append(("crossed", row, name, number))

    verdicts: dict[tuple[str, str], list[tuple[list[bool], float]]] = defaultdict(list)
    for adapter, requests in asked.items():
        model = base
        if adapter is not None:
            model = PeftModel.from_pretrained(copy.deepcopy(base), adapter_path(work, adapter)).merge_and_unload()
        told: dict[tuple[int, ...], tuple[list[bool], float]] = {}
        for label, row, name, number in requests:
            answer = answers[row][name][number]
            if (key := (number, *answer)) not in told:
                told[key] = _verdict(model, prompts[number], answer)
            verdicts[label, name].append(told[key])

    rows: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for (row, name), found in verdicts.items():
        chosen = [is_chosen for answer, _ in found for is_chosen in answer]
        rows[row][name] = {
            "share": sum(chosen) / len(chosen),
            "gap": max(gap for _, gap in found),
            "exact": sum(all(answer) for answer, _ in found),
            "answers": len(found),
        }
    crossed = {name: verdict["share"] for name, verdict in rows.pop("crossed", {}).items()}
    return {"rows": rows, "crossed": crossed}


def _verdict(model: Any, prompt: list[int], answer: list[int]) -> tuple[list[bool], float]:
    """(For each token of the answer whether it is the model's choice, the greatest gap in nats)."""
    import torch

    with torch.no_grad():
        ids = torch.tensor([prompt + answer], device=model.device)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
        logits_TV = model.lm_head(hidden)
    best, chosen = logits_TV.max(dim=-1), ids[0, len(prompt) :]
    gaps = best.values - logits_TV.gather(1, chosen[:, None])[:, 0]
    return (best.indices == chosen).tolist(), float(gaps.max())
