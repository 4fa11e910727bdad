"""A base model ready for use: frozen weights on one device, tokenizer, digest, and which architectures are taken."""

import copy
import hashlib
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers import logging as transformers_logging

from shared.errors import InvalidRequest, SettingsError, UnsupportedArchitecture
from worker import attention
from worker.kernels.threads import one_core
from worker.lora import targets

SUPPORTED: Final = MappingProxyType(
    {
        "cohere": "Cohere Command R",
        "gemma2": "Gemma 2",
        "gemma3_text": "Gemma 3 (text)",
        "gpt2": "GPT-2",
        "gpt_neox": "GPT-NeoX, Pythia",
        "granite": "Granite",
        "llama": "Llama, SmolLM",
        "mistral": "Mistral",
        "olmo2": "OLMo 2",
        "opt": "OPT",
        "phi": "Phi",
        "phi3": "Phi-3, Phi-4",
        "qwen2": "Qwen2, Qwen2.5",
        "qwen3": "Qwen3",
        "stablelm": "StableLM",
        "starcoder2": "StarCoder2",
    }
)
"""model_type -> what people call it. Each has a test that packed sequences give what they give one by one."""

_OWN_ATTENTION = "its attention does not go through Transformers' attention interface, so sequences cannot be packed"
_ALIBI = "its ALiBi biases count tokens over the whole row, so sequences cannot be packed"
REFUSED: Final = MappingProxyType(
    {
        "bloom": _ALIBI,
        "falcon": _OWN_ATTENTION,
        "gpt_neo": _OWN_ATTENTION,
        "gpt_oss": "its attention sinks add a learned term to the softmax, which fused attention does not have",
        "mpt": _ALIBI,
    }
)
"""model_type -> why it is not taken, for those that people are likely to try."""

# Names under which the supported configurations hold a dropout or layer-skipping probability.
_DROPOUTS: Final = (
    "activation_dropout",
    "attention_dropout",
    "attn_pdrop",
    "dropout",
    "embd_pdrop",
    "embedding_dropout",
    "hidden_dropout",
    "layerdrop",
    "resid_pdrop",
    "residual_dropout",
)


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """One frozen causal language model. Any token in `eos_token_ids` ends an answer; `context_length` is in tokens."""

    model: torch.nn.Module
    tokenizer: Any
    name: str
    digest: str
    context_length: int
    architecture: str
    eos_token_ids: frozenset[int]
    device: torch.device
    dtype: torch.dtype


def load_base_model(
    directory: Path,
    *,
    name: str,
    digest: str,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
) -> BaseModel:
    """The model in a safetensors `directory`, in eval mode, frozen, its own dropout 0 even in train mode.

    Reads local files only and runs no code from them. Raises UnsupportedArchitecture, or InvalidRequest where the files
    do not make a whole model with a tokenizer that fits it. `digest` is taken on trust: the importer computed it.
    Takes one core, so that another thread can own the model and use all (see `one_core`).
    """
    with one_core():
        return _loaded(directory, name=name, digest=digest, device=device, dtype=dtype)


def _loaded(
    directory: Path,
    *,
    name: str,
    digest: str,
    device: Literal["auto", "cpu", "cuda"],
    dtype: Literal["auto", "float32", "bfloat16"],
) -> BaseModel:
    config = read_config(directory)
    for field in _DROPOUTS:
        if getattr(config, field, None) is not None:
            setattr(config, field, 0.0)
    on = choose_device(device)
    as_dtype = choose_dtype(on, dtype)
    tokenizer, eos_token_ids = load_tokenizer(directory, config)
    with loading(directory):
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=as_dtype,
            attn_implementation=attention.NAME,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # `check_whole` names them; without it, nothing would
            output_loading_info=True,
        )
    check_whole(directory, info)
    _check_vocabulary(directory, model, tokenizer)
    model.requires_grad_(False).eval().to(on)
    return BaseModel(
        model=model,
        tokenizer=tokenizer,
        name=name,
        digest=digest,
        context_length=context_length(config),
        architecture=config.model_type,
        eos_token_ids=eos_token_ids,
        device=on,
        dtype=as_dtype,
    )


def load_tokenizer(directory: Path, config: PreTrainedConfig) -> tuple[Any, frozenset[int]]:
    """The tokenizer in `directory`, and every token that ends an answer there; needs no weights."""
    with loading(directory):
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    return tokenizer, _eos_token_ids(directory, config, tokenizer)


def hollow_model(config: PreTrainedConfig) -> torch.nn.Module:
    """The modules and shapes of a model without its numbers, on the meta device; may run beside a training."""
    with torch.device("meta"):
        # Transformers sets torch's default dtype for all threads while it builds; float32 is what it is anyway.
        model: torch.nn.Module = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32, trust_remote_code=False
        )
    return model


def read_config(directory: Path) -> PreTrainedConfig:
    """The model configuration in `directory`, checked: no code beside it, not quantized, a supported architecture."""
    for filename in ("config.json", "tokenizer_config.json"):
        if "auto_map" in read_json(directory / filename):
            raise InvalidRequest(f"{filename} names code to run (auto_map): models with code of their own are refused")
    declared = read_json(directory / "config.json")
    check_model_type(str(declared.get("model_type")))
    with loading(directory):
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    check_architecture(config)
    return config


def check_architecture(config: PreTrainedConfig) -> None:
    """Raises UnsupportedArchitecture with the reason unless this service can train and serve such a model."""
    check_model_type(config.model_type)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedArchitecture("the weights are quantized: give the float32, bfloat16 or float16 weights")
    if getattr(config, "use_bidirectional_attention", None) or getattr(config, "is_causal", True) is False:
        raise UnsupportedArchitecture(f"this {config.model_type} model looks ahead: only causal models are supported")


def check_model_type(model_type: str) -> None:
    """Raises UnsupportedArchitecture with the reason if no model of this type is taken."""
    if model_type in REFUSED:
        raise UnsupportedArchitecture(f"{model_type} is not supported: {REFUSED[model_type]}")
    if model_type not in SUPPORTED:
        raise UnsupportedArchitecture(f"{model_type} is not supported; supported are {', '.join(SUPPORTED)}")


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """`wanted`, or for "auto" the GPU if there is one. Raises SettingsError if "cuda" is wanted and there is none."""
    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise SettingsError("LORAD_DEVICE=cuda, but torch sees no CUDA device")
    return torch.device("cuda" if has_gpu and wanted != "cpu" else "cpu")


def choose_dtype(device: torch.device, wanted: Literal["auto", "float32", "bfloat16"]) -> torch.dtype:
    """`wanted`, or for "auto" bfloat16 on a GPU that computes in it and on a CPU that is fast in it; else float32.

    Fast is at least 1.5 times as fast as in float32, so that adapters and answers may differ slightly from processor to
    processor. Never what the checkpoint happens to be stored in, which is Transformers' default.
    """
    if wanted != "auto":
        return torch.float32 if wanted == "float32" else torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if bfloat16_speedup() >= 1.5 else torch.float32


@cache
def bfloat16_speedup() -> float:
    """How many times as fast as in float32 this CPU multiplies in bfloat16: measured once a process, in some 20 ms.

    About 4 with AVX512-BF16, more with AMX, well below 1 where bfloat16 is emulated. The best of several short tries
    each, in turns, so that other work on the machine does not decide.
    """
    best = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for _ in range(6):
        for dtype, best_s in best.items():
            left = right = torch.ones(384, 384, dtype=dtype)
            started_s = time.perf_counter()
            left @ right
            best[dtype] = min(best_s, time.perf_counter() - started_s)
    return best[torch.float32] / best[torch.bfloat16]


def context_length(config: PreTrainedConfig) -> int:
    """The longest sequence, in tokens, whose result does not depend on what else is in the batch.

    Rotary embeddings of type "longrope" change for the whole batch as soon as one sequence outgrows the original
    length, so theirs ends there; for other models it is all the positions they have.
    """
    longest = int(config.max_position_embeddings)
    rope = getattr(config, "rope_parameters", None) or {}
    return min(longest, rope["original_max_position_embeddings"]) if rope.get("rope_type") == "longrope" else longest


def digest_directory(directory: Path) -> str:
    """SHA-256, in hex, over the relative names and the bytes of all files below `directory`, in order of name.

    Name and content are each preceded by their length, so that no two different directories give the same input.
    """
    total = hashlib.sha256()
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        name = path.relative_to(directory).as_posix().encode()
        total.update(len(name).to_bytes(8, "big") + name + path.stat().st_size.to_bytes(8, "big"))
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def describe(model: torch.nn.Module, tokenizer: Any) -> dict[str, object]:
    """What others may know of the model without loading it: the `config` of its row. JSON values only."""
    config: Any = model.config
    return {
        "architecture": config.model_type,
        "context_length": context_length(config),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "vocab_size": config.vocab_size,
        "linear_modules": targets.linear_leaf_names(model),
        "presets": targets.preset_leaf_names(model),
        "chat_template": tokenizer.chat_template is not None,
    }


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file, unless it is the model's own config.json."""
    if not path.is_file():
        if path.name == "config.json":
            raise InvalidRequest(f"{path.parent} has no config.json: not a Transformers model directory")
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise InvalidRequest(f"{path.name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"{path.name} is not a JSON object")
    return value


def check_whole(source: Path, info: dict[str, Any]) -> None:
    """Raises InvalidRequest if some weights were not in the files, since Transformers makes those up at random."""
    problems = [f"missing {key}" for key in sorted(info["missing_keys"])]
    problems += [f"{key} is {tuple(has)}, not {tuple(needs)}" for key, has, needs in sorted(info["mismatched_keys"])]
    problems += [f"unknown {key}" for key in sorted(info["unexpected_keys"])]
    problems += info["error_msgs"]
    if problems:
        shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise InvalidRequest(f"the weights in {source} do not fit its configuration: {shown}")


def _check_vocabulary(directory: Path, model: Any, tokenizer: Any) -> None:
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise InvalidRequest(f"the tokenizer in {directory} has {len(tokenizer)} tokens, the model only {rows}")


def _eos_token_ids(directory: Path, config: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that any of the files calls the end; chat models often have one more than the base they came from."""
    generation = read_json(directory / "generation_config.json")
    found: set[int] = set()
    for given in (generation.get("eos_token_id"), config.eos_token_id, tokenizer.eos_token_id):
        found.update([] if given is None else [given] if isinstance(given, int) else given)
    if tokenizer.eos_token_id is None:
        raise InvalidRequest(f"the tokenizer in {directory} has no end-of-sequence token")
    return frozenset(found)


@contextmanager
def loading(source: Path) -> Iterator[None]:
    """Around calls of Transformers: they print nothing, and errors over unusable files become InvalidRequest."""
    had_bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # the readers below Transformers raise anything over damaged files, Exception itself too
        raise InvalidRequest(f"cannot load the model in {source}: {one_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()


def one_line(error: Exception) -> str:
    """What an exception says, on one line of at most 300 characters, with its type if it says next to nothing."""
    said = " ".join(str(error).split())[:300]
    return said if " " in said else f"{type(error).__name__} {said}".strip()
