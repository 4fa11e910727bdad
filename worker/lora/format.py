"""An adapter on disk, in PEFT's format exactly, so that PEFT, vLLM and others load it as it is.

    adapter_model.safetensors   base_model.model.<module path>.lora_A.weight (R, I), ....lora_B.weight (O, R)
    adapter_config.json         `worker.lora.peft_config`
    README.md                   a model card

Source: PEFT 0.21.2, `docs/source/developer_guides/checkpoint.md`.
"""

import hashlib
import json
from pathlib import Path
from typing import Final

import safetensors.torch
import torch

from shared import limits
from worker.lora.peft_config import CONFIG_NAME, parse_config, render_config
from worker.lora.spec import AdapterSpec, LoadedAdapter
from worker.lora.stored import FileBytes, StoredAdapter
from worker.lora.tensor_file import TENSORS_NAME, check_start, parse_tensors, refuse

CARD_NAME: Final = "README.md"
__all__ = [
    "CARD_NAME",
    "CONFIG_NAME",
    "TENSORS_NAME",
    "AdapterFiles",
    "AdapterSpec",
    "LoadedAdapter",
    "StoredAdapter",
    "read_adapter",
    "write_adapter",
]


class AdapterFiles:
    """The files of an adapter, in memory: every byte is read once, so that what is checked is what is used.

    Raises IncompatibleAdapter if they are not there or too large; and AdapterCorrupt where a checksum was recorded and
    a file cannot be read.
    """

    def __init__(self, stored: StoredAdapter) -> None:
        self._config = FileBytes(
            stored.directory / CONFIG_NAME,
            max_bytes=limits.ADAPTER_CONFIG_BYTES,
            expected=stored.sha256.get(CONFIG_NAME),
        )
        self._tensors = FileBytes(
            stored.directory / TENSORS_NAME,
            max_bytes=limits.ADAPTER_BYTES,
            expected=stored.sha256.get(TENSORS_NAME),
            check_start=check_start,
        )

    def parse(self) -> LoadedAdapter:
        """The adapter; not before `digest` has returned is it known to be the recorded one. IncompatibleAdapter."""
        spec, base_model_name = parse_config(self._config.content)
        tensors = parse_tensors(self._tensors.content)
        problems = [
            f"{path}: lora_A has rank {a_RI.shape[0]}, {CONFIG_NAME} says {spec.rank(path)}"
            for path, (a_RI, _) in tensors.items()
            if a_RI.shape[0] != spec.rank(path)
        ]
        if problems:
            raise refuse(problems, file=TENSORS_NAME)
        return LoadedAdapter(spec=spec, tensors=tensors, base_model_name=base_model_name)

    def digest(self) -> str:
        """Hex SHA-256 over the checksums of both files; AdapterCorrupt if one is not the recorded one."""
        return hashlib.sha256(f"{self._config.sha256()}\n{self._tensors.sha256()}".encode()).hexdigest()


def read_adapter(directory: Path) -> LoadedAdapter:
    """The adapter in `directory`, in memory; no file is looked at again.

    Needs no base model: whether it fits one is for `AdapterManager.load_tensors` to say. Raises IncompatibleAdapter,
    one for everything that is wrong with a file.
    """
    return AdapterFiles(StoredAdapter(directory)).parse()


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
