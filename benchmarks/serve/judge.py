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
        by_prompt: dict[int, list[tuple[str, str, list[int]]]] = defaultdict(list)
        for label, row, name, number in requests:
            by_prompt[number].append((label, name, answers[row][name][number]))
        for number, given in by_prompt.items():
            distinct = [list(answer) for answer in dict.fromkeys(tuple(answer) for _, _, answer in given)]
            told = _told(model, prompts[number], distinct)
            for label, name, answer in given:
                verdicts[label, name].append(told[distinct.index(answer)])

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


def _told(model: Any, prompt: list[int], answers: list[list[int]]) -> list[tuple[list[bool], float]]:
    """For each answer to one prompt: (of each token whether it is the model's choice, the greatest gap in nats)."""
    import torch

    answers_BT = torch.tensor(answers, device=model.device)
    with torch.no_grad():
        read = model.model(input_ids=torch.tensor([prompt], device=model.device), use_cache=True)
        first = read.last_hidden_state[:, -1:].expand(len(answers), -1, -1)
        read.past_key_values.batch_repeat_interleave(len(answers))
        later = model.model(input_ids=answers_BT[:, :-1], cache=read.past_key_values).last_hidden_state
        logits_BTV = model.lm_head(torch.cat([first, later], dim=1))
    best = logits_BTV.max(dim=-1)
    gaps_BT = best.values - logits_BTV.gather(2, answers_BT[:, :, None])[:, :, 0]
    is_chosen_BT = best.indices == answers_BT
    return list(zip(is_chosen_BT.tolist(), gaps_BT.amax(dim=1).tolist(), strict=True))
