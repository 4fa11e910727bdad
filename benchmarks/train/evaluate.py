"""The one judge of all adapters: validation loss in plain PEFT and Transformers, fp32, one sample at a time."""

import warnings
from pathlib import Path
from typing import Any

from benchmarks.train.data import read_tokens


def evaluate(request: dict[str, Any]) -> dict[str, Any]:
    """`base` and, per name in `adapters`, the mean loss over all label tokens of the validation samples, in nats.

    Asserts that PEFT finds a tensor in the file for each of the adapter's weights and no other.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    work, device = Path(request["work"]), request["plan"]["device"]
    samples = read_tokens(work, "valid")[: request["num_valid"]]
    base = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.float32).eval().to(device)
    trunk, head = base.model, base.lm_head

    @torch.no_grad()
    def loss() -> float:
        total, num_labels = 0.0, 0
        for sample in samples:
            ids, labels = (torch.tensor(sample[key], device=device) for key in ("input_ids", "labels"))
            places = (labels != -100).nonzero()[:, 0]
            hidden = trunk(input_ids=ids[None], use_cache=False).last_hidden_state[0, places - 1]
            total += float(torch.nn.functional.cross_entropy(head(hidden), labels[places], reduction="sum"))
            num_labels += len(places)
        return total / num_labels

    losses = {"base": loss()}
    for name, directory in request["adapters"].items():
        with warnings.catch_warnings():
            # PEFT only warns of keys that it misses; here that is an error.
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            model = PeftModel.from_pretrained(base, directory).eval()
        losses[name] = loss()
        base = model.unload()
    return {"losses": losses}
