"""An adapter on disk, in PEFT's format exactly, so that PEFT, vLLM and others load it as it is.

    adapter_model.safetensors   base_model.model.<module path>.lora_A.weight (R, I), ....lora_B.weight (O, R)
    adapter_config.json         `worker.lora.peft_config`
    README.md                   a model card

Source: PEFT 0.21.2, `docs/source/developer_guides/checkpoint.md`.
"""

import json
from pathlib import Path
from typing import Final

import safetensors.torch
import torch

from shared import limits
from worker.lora.peft_config import CONFIG_NAME, parse_config, render_config
from worker.lora.spec import AdapterSpec, LoadedAdapter
from worker.lora.tensor_file import read_bounded, read_tensors, refuse

TENSORS_NAME: Final = "adapter_model.safetensors"
CARD_NAME: Final = "README.md"
__all__ = ["CARD_NAME", "CONFIG_NAME", "TENSORS_NAME", "AdapterSpec", "LoadedAdapter", "read_adapter", "write_adapter"]


def read_adapter(directory: Path) -> LoadedAdapter:
    """The adapter in `directory`, in memory; no file is looked at again.

    Needs no base model: whether it fits one is for `AdapterManager.load_tensors` to say. Raises IncompatibleAdapter,
    one for everything that is wrong with a file.
    """
    spec, base_model_name = parse_config(read_bounded(directory / CONFIG_NAME, max_bytes=limits.ADAPTER_CONFIG_BYTES))
    tensors = read_tensors(directory / TENSORS_NAME)
    problems = [
        f"{path}: lora_A has rank {a_RI.shape[0]}, {CONFIG_NAME} says {spec.rank(path)}"
        for path, (a_RI, _) in tensors.items()
        if a_RI.shape[0] != spec.rank(path)
    ]
    if problems:
        raise refuse(problems, file=TENSORS_NAME)
    return LoadedAdapter(spec=spec, tensors=tensors, base_model_name=base_model_name)


def write_adapter(
    directory: Path, adapter: LoadedAdapter, *, base_model_name: str, task_type: str = "CAUSAL_LM"
) -> None:
    """Write the three files into `directory`, which is made if need be; the same adapter gives the same bytes.

    Makes nothing durable or atomic; that is for whoever publishes the directory.
    """
    flat = {
        f"base_model.model.{path}.lora_{which}.weight": tensor.detach().to("cpu", torch.float32).contiguous()
        for path, pair in adapter.tensors.items()
        for which, tensor in zip("AB", pair, strict=True)
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / TENSORS_NAME).write_bytes(safetensors.torch.save(flat, metadata={"format": "pt"}))
    config = render_config(adapter.spec, base_model_name=base_model_name, task_type=task_type)
    (directory / CONFIG_NAME).write_bytes(config)
    (directory / CARD_NAME).write_text(_card(adapter.spec, base_model_name), encoding="utf-8")


def _card(spec: AdapterSpec, base_model_name: str) -> str:
    """The model card. Names are quoted as JSON, which YAML reads as it is and which ends no line early."""
    name = json.dumps(base_model_name)
    targets = spec.target_modules if isinstance(spec.target_modules, str) else ", ".join(spec.target_modules)
    own = len(spec.rank_pattern.keys() | spec.alpha_pattern.keys())
    but = f"; {own} patterns in {CONFIG_NAME} give single modules their own r or alpha" if own else ""
    kind = "rsLoRA (s = alpha / sqrt(r))" if spec.use_rslora else "LoRA (s = alpha / r)"
    return f"""---
base_model: {name}
library_name: peft
pipeline_tag: text-generation
tags:
- lora
- lorad
---

# LoRA adapter for {name}

{kind}, r = {spec.r}, alpha = {spec.alpha:g}, dropout = {spec.dropout:g}, on {targets}{but}.

The files are in PEFT's format: `PeftModel.from_pretrained(base_model, this_directory)`.
"""
