"""Base models that are refused, each with one line that says why."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from shared.errors import InvalidRequest, UnsupportedArchitecture
from worker.base_model import REFUSED, SUPPORTED, BaseModel, check_architecture, load_base_model


def load(directory: Path) -> BaseModel:
    return load_base_model(directory, name="tiny", digest="d", device="cpu", dtype="float32")


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(source: Path, **changes: torch.Tensor | None) -> None:
    path = source / "model.safetensors"
    tensors = load_file(path) | {k.replace("__", "."): v for k, v in changes.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_unsuitable_architecture_is_refused_with_its_reason(model_type: str) -> None:
    """The error names the architecture and says why."""
    with pytest.raises(UnsupportedArchitecture) as caught:
        check_architecture(AutoConfig.for_model(model_type))

    assert caught.value.message == f"{model_type} is not supported: {REFUSED[model_type]}"


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_unsuitable_model_directory_is_refused(source: Path, model_type: str) -> None:
    """A directory of such a model is refused too, before its weights are read."""
    edit_json(source / "config.json", model_type=model_type)
    (source / "model.safetensors").unlink()

    with pytest.raises(UnsupportedArchitecture, match=f"^{model_type} is not supported: "):
        load(source)


@pytest.mark.parametrize("model_type", ["mamba", "cohere2", "never-heard-of"])
def test_unknown_architecture_lists_what_is_supported(source: Path, model_type: str) -> None:
    """Any other architecture is refused with the list of those that work."""
    edit_json(source / "config.json", model_type=model_type)

    with pytest.raises(UnsupportedArchitecture) as caught:
        load(source)

    assert all(name in caught.value.message for name in [model_type, *SUPPORTED])


def test_bidirectional_model_is_refused() -> None:
    """A supported architecture configured to look ahead is refused; the same looking back is not."""
    check_architecture(AutoConfig.for_model("gemma3_text"))

    with pytest.raises(UnsupportedArchitecture, match="looks ahead"):
        check_architecture(AutoConfig.for_model("gemma3_text", use_bidirectional_attention=True))


def test_quantized_model_is_refused(source: Path) -> None:
    """Quantized weights are refused."""
    edit_json(source / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})

    with pytest.raises(UnsupportedArchitecture, match="quantized"):
        load(source)


@pytest.mark.parametrize("filename", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_refused(source: Path, filename: str) -> None:
    """A file that names code is refused, and the code beside it does not run."""
    (source / "evil.py").write_text("raise SystemExit('ran')")
    edit_json(source / filename, auto_map={"AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", None]})

    with pytest.raises(InvalidRequest, match="auto_map"):
        load(source)


def test_pickled_weights_are_not_read(source: Path) -> None:
    """A directory with only pickled weights cannot be loaded."""
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()

    with pytest.raises(InvalidRequest, match="cannot load the model"):
        load(source)


def test_missing_weight_is_refused(source: Path) -> None:
    """Weights that are absent are an error that names them; Transformers alone would make them up."""
    edit_weights(source, model__layers__0__self_attn__q_proj__weight=None, model__norm__weight=None)

    with pytest.raises(InvalidRequest) as caught:
        load(source)

    assert "missing model.layers.0.self_attn.q_proj.weight; missing model.norm.weight" in caught.value.message


def test_unknown_weight_is_refused(source: Path) -> None:
    """A weight the architecture has no place for would be dropped in silence, so it is an error."""
    edit_weights(source, model__layers__0__self_attn__q_proj__bias=torch.ones(32))

    with pytest.raises(InvalidRequest, match=r"unknown model\.layers\.0\.self_attn\.q_proj\.bias"):
        load(source)


def test_weight_of_wrong_shape_is_refused(source: Path) -> None:
    """A weight of another shape is an error that gives both shapes."""
    edit_weights(source, model__norm__weight=torch.ones(31))

    with pytest.raises(InvalidRequest, match=r"model\.norm\.weight is \(31,\), not \(32,\)"):
        load(source)


def test_truncated_weights_are_refused(source: Path) -> None:
    """Half a file is one clear error."""
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])

    with pytest.raises(InvalidRequest, match="cannot load the model"):
        load(source)


def test_wrong_configuration_value_is_refused(source: Path) -> None:
    """A configuration value of the wrong type is one clear error on one line."""
    edit_json(source / "config.json", hidden_size="x")

    with pytest.raises(InvalidRequest, match=r"^cannot load .*hidden_size.*$"):
        load(source)


def test_missing_tokenizer_is_refused(source: Path) -> None:
    """A model without a tokenizer is of no use here."""
    (source / "tokenizer.json").unlink()

    with pytest.raises(InvalidRequest, match=r"^cannot load .*tokenizer.*$"):
        load(source)


def test_loading_is_quiet(source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Loading prints nothing of Transformers' own, neither progress bars nor its report over bad weights."""
    load(source)
    edit_weights(source, model__norm__weight=torch.ones(31))
    with pytest.raises(InvalidRequest):
        load(source)

    assert capfd.readouterr() == ("", "")


def test_tokenizer_larger_than_model_is_refused(source: Path) -> None:
    """A token without an embedding is found at load, not in the middle of a job."""
    edit_json(source / "config.json", vocab_size=258)
    weights = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    edit_weights(source, model__embed_tokens__weight=weights[:258].clone())

    with pytest.raises(InvalidRequest, match="has 259 tokens, the model only 258"):
        load(source)


def test_tokenizer_without_end_is_refused(source: Path) -> None:
    """Without an end token no answer could end."""
    edit_json(source / "tokenizer_config.json", eos_token=None)

    with pytest.raises(InvalidRequest, match="no end-of-sequence token"):
        load(source)


@pytest.mark.parametrize("content", [None, "{", "[]"], ids=["missing", "not json", "not an object"])
def test_directory_without_configuration_is_refused(source: Path, content: str | None) -> None:
    """No usable config.json is one clear error."""
    (source / "config.json").unlink()
    if content is not None:
        (source / "config.json").write_text(content)

    with pytest.raises(InvalidRequest, match=r"config\.json"):
        load(source)
