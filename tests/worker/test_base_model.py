"""Loading base models: what is taken, what is refused and why, and what the loaded model promises."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from shared.errors import InvalidRequest, SettingsError, UnsupportedArchitecture
from worker.base_model import (
    REFUSED,
    SUPPORTED,
    BaseModel,
    check_architecture,
    choose_device,
    choose_dtype,
    context_length,
    describe,
    digest_directory,
    load_base_model,
)


@pytest.fixture
def directory(tiny_base_directory: Path, tmp_path: Path) -> Path:
    """A model directory to damage."""
    return Path(shutil.copytree(tiny_base_directory, tmp_path / "model"))


def load(directory: Path) -> BaseModel:
    return load_base_model(directory, name="tiny", digest="d", device="cpu", dtype="float32")


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(directory: Path, **changes: torch.Tensor | None) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path) | {k.replace("__", "."): v for k, v in changes.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, path, metadata={"format": "pt"})


def test_loaded_model_computes_what_was_saved(tiny_base: BaseModel, tiny_llama: PreTrainedModel) -> None:
    """Loading gives the very logits of the model that was saved."""
    ids = torch.arange(20)[None]

    with torch.no_grad():
        assert torch.equal(tiny_base.model(input_ids=ids).logits, tiny_llama(input_ids=ids).logits)


def test_loaded_model_is_described(tiny_base: BaseModel) -> None:
    """The record beside the model says what engines need to know of it."""
    assert (tiny_base.name, tiny_base.architecture, tiny_base.context_length) == ("tiny", "llama", 256)
    assert (tiny_base.device.type, tiny_base.dtype) == ("cpu", torch.float32)
    assert tiny_base.eos_token_ids == {2}
    assert tiny_base.tokenizer.decode(tiny_base.tokenizer("hé").input_ids) == "hé"


def test_loaded_model_is_frozen_and_in_eval_mode(tiny_base: BaseModel) -> None:
    """No base weight takes a gradient and no module is in train mode."""
    assert not any(p.requires_grad for p in tiny_base.model.parameters())
    assert not any(m.training for m in tiny_base.model.modules())


@pytest.mark.parametrize("config", [OPTConfig, GPT2Config], ids=["opt", "gpt2"])
def test_base_dropout_is_off(
    config: type[PreTrainedConfig], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A model whose configuration asks for dropout computes the same in train mode as in eval mode."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 259}
    extra = {"ffn_dim": 32, "word_embed_proj_dim": 32, "layerdrop": 0.5} if config is OPTConfig else {}
    ends = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": None}
    model = AutoModelForCausalLM.from_config(config(**sizes, **extra, **ends))
    assert any(m.p > 0 for m in model.modules() if isinstance(m, torch.nn.Dropout)) or model.config.dropout > 0
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)

    base = load(tmp_path).model

    ids = torch.arange(12)[None]
    assert torch.equal(base.train()(input_ids=ids).logits, base.eval()(input_ids=ids).logits)


def test_dtype_is_not_the_checkpoints(directory: Path) -> None:
    """A float16 checkpoint is loaded in float32 on a CPU, not in the dtype it happens to have."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float16, local_files_only=True)
    model.save_pretrained(directory)

    base = load_base_model(directory, name="tiny", digest="d", device="cpu")

    assert {t.dtype for t in load_file(directory / "model.safetensors").values()} == {torch.float16}
    assert base.dtype == torch.float32
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}


def test_dtype_asked_for_is_given(directory: Path) -> None:
    """bfloat16 is there for who asks for it."""
    base = load_base_model(directory, name="tiny", digest="d", device="cpu", dtype="bfloat16")

    assert {p.dtype for p in base.model.parameters()} == {base.dtype} == {torch.bfloat16}


def test_automatic_dtype_on_cpu_is_float32() -> None:
    """Every CPU computes in float32, whatever instructions it has."""
    assert choose_dtype(torch.device("cpu"), "auto") == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_a_wrong_setting() -> None:
    """Asking for CUDA where there is none is one clear error; 'auto' takes the CPU."""
    assert choose_device("auto").type == "cpu"
    with pytest.raises(SettingsError, match="LORAD_DEVICE=cuda, but torch sees no CUDA device"):
        choose_device("cuda")


def test_every_end_token_counts(directory: Path) -> None:
    """Ends named by the generation configuration count beside the tokenizer's own."""
    edit_json(directory / "generation_config.json", eos_token_id=[7, 9])

    assert load(directory).eos_token_ids == {2, 7, 9}


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_unsuitable_architecture_is_refused_with_its_reason(model_type: str) -> None:
    """The error names the architecture and says why."""
    with pytest.raises(UnsupportedArchitecture) as caught:
        check_architecture(AutoConfig.for_model(model_type))

    assert caught.value.message == f"{model_type} is not supported: {REFUSED[model_type]}"


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_unsuitable_model_directory_is_refused(directory: Path, model_type: str) -> None:
    """A directory of such a model is refused too, before its weights are read."""
    edit_json(directory / "config.json", model_type=model_type)
    (directory / "model.safetensors").unlink()

    with pytest.raises(UnsupportedArchitecture, match=f"^{model_type} is not supported: "):
        load(directory)


@pytest.mark.parametrize("model_type", ["mamba", "cohere2", "never-heard-of"])
def test_unknown_architecture_lists_what_is_supported(directory: Path, model_type: str) -> None:
    """Any other architecture is refused with the list of those that work."""
    edit_json(directory / "config.json", model_type=model_type)

    with pytest.raises(UnsupportedArchitecture) as caught:
        load(directory)

    assert all(name in caught.value.message for name in [model_type, *SUPPORTED])


def test_bidirectional_model_is_refused() -> None:
    """A supported architecture configured to look ahead is refused; the same looking back is not."""
    check_architecture(AutoConfig.for_model("gemma3_text"))

    with pytest.raises(UnsupportedArchitecture, match="looks ahead"):
        check_architecture(AutoConfig.for_model("gemma3_text", use_bidirectional_attention=True))


def test_quantized_model_is_refused(directory: Path) -> None:
    """Quantized weights are refused."""
    edit_json(directory / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})

    with pytest.raises(UnsupportedArchitecture, match="quantized"):
        load(directory)


@pytest.mark.parametrize("filename", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_refused(directory: Path, filename: str) -> None:
    """A file that names code is refused, and the code beside it does not run."""
    (directory / "evil.py").write_text("raise SystemExit('ran')")
    edit_json(directory / filename, auto_map={"AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", None]})

    with pytest.raises(InvalidRequest, match="auto_map"):
        load(directory)


def test_pickled_weights_are_not_read(directory: Path) -> None:
    """A directory with only pickled weights cannot be loaded."""
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()

    with pytest.raises(InvalidRequest, match="cannot load the model"):
        load(directory)


def test_missing_weight_is_refused(directory: Path) -> None:
    """Weights that are absent are an error that names them; Transformers alone would make them up."""
    edit_weights(directory, model__layers__0__self_attn__q_proj__weight=None, model__norm__weight=None)

    with pytest.raises(InvalidRequest) as caught:
        load(directory)

    assert "missing model.layers.0.self_attn.q_proj.weight; missing model.norm.weight" in caught.value.message


def test_unknown_weight_is_refused(directory: Path) -> None:
    """A weight the architecture has no place for would be dropped in silence, so it is an error."""
    edit_weights(directory, model__layers__0__self_attn__q_proj__bias=torch.ones(32))

    with pytest.raises(InvalidRequest, match=r"unknown model\.layers\.0\.self_attn\.q_proj\.bias"):
        load(directory)


def test_weight_of_wrong_shape_is_refused(directory: Path) -> None:
    """A weight of another shape is an error that gives both shapes."""
    edit_weights(directory, model__norm__weight=torch.ones(31))

    with pytest.raises(InvalidRequest, match=r"model\.norm\.weight is \(31,\), not \(32,\)"):
        load(directory)


def test_truncated_weights_are_refused(directory: Path) -> None:
    """Half a file is one clear error."""
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])

    with pytest.raises(InvalidRequest, match="cannot load the model"):
        load(directory)


def test_wrong_configuration_value_is_refused(directory: Path) -> None:
    """A configuration value of the wrong type is one clear error on one line."""
    edit_json(directory / "config.json", hidden_size="x")

    with pytest.raises(InvalidRequest, match=r"^cannot load .*hidden_size.*$"):
        load(directory)


def test_missing_tokenizer_is_refused(directory: Path) -> None:
    """A model without a tokenizer is of no use here."""
    (directory / "tokenizer.json").unlink()

    with pytest.raises(InvalidRequest, match=r"^cannot load .*tokenizer.*$"):
        load(directory)


def test_loading_is_quiet(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Loading prints nothing of Transformers' own, neither progress bars nor its report over bad weights."""
    load(directory)
    edit_weights(directory, model__norm__weight=torch.ones(31))
    with pytest.raises(InvalidRequest):
        load(directory)

    assert capfd.readouterr() == ("", "")


def test_tokenizer_larger_than_model_is_refused(directory: Path) -> None:
    """A token without an embedding is found at load, not in the middle of a job."""
    edit_json(directory / "config.json", vocab_size=258)
    weights = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    edit_weights(directory, model__embed_tokens__weight=weights[:258].clone())

    with pytest.raises(InvalidRequest, match="has 259 tokens, the model only 258"):
        load(directory)


def test_tokenizer_without_end_is_refused(directory: Path) -> None:
    """Without an end token no answer could end."""
    edit_json(directory / "tokenizer_config.json", eos_token=None)

    with pytest.raises(InvalidRequest, match="no end-of-sequence token"):
        load(directory)


@pytest.mark.parametrize("content", [None, "{", "[]"], ids=["missing", "not json", "not an object"])
def test_directory_without_configuration_is_refused(directory: Path, content: str | None) -> None:
    """No usable config.json is one clear error."""
    (directory / "config.json").unlink()
    if content is not None:
        (directory / "config.json").write_text(content)

    with pytest.raises(InvalidRequest, match=r"config\.json"):
        load(directory)


def test_context_ends_where_longrope_changes() -> None:
    """Long rotary factors would apply to a whole batch once one sequence is long, so the context ends before that."""
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "pad_token_id": None}
    config = Phi3Config(
        **sizes,
        max_position_embeddings=128,
        original_max_position_embeddings=64,
        rope_parameters=factors | {"original_max_position_embeddings": 64},
    )

    assert context_length(config) == 64
    assert context_length(Phi3Config(**sizes, max_position_embeddings=128)) == 128


def test_digest_is_of_names_and_bytes(tmp_path: Path) -> None:
    """The digest is SHA-256 over the length and bytes of each name and each content, in order of name."""
    (tmp_path / "b").write_bytes(b"123")
    (tmp_path / "a").write_bytes(b"")

    expected = b"".join(len(x).to_bytes(8, "big") + x for x in (b"a", b"", b"b", b"123"))

    assert digest_directory(tmp_path) == hashlib.sha256(expected).hexdigest()


def test_digest_changes_with_a_byte(directory: Path) -> None:
    """One flipped bit in the weights gives another digest; undone, the old one."""
    before = digest_directory(directory)
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())

    content[-1] ^= 1
    path.write_bytes(content)
    flipped = digest_directory(directory)
    content[-1] ^= 1
    path.write_bytes(content)

    assert flipped != before
    assert digest_directory(directory) == before


def test_digest_changes_with_a_name(directory: Path) -> None:
    """The same bytes under another name give another digest."""
    before = digest_directory(directory)

    (directory / "tokenizer.json").rename(directory / "tokenizer2.json")

    assert digest_directory(directory) != before


def test_description_says_what_the_api_needs(tiny_base: BaseModel) -> None:
    """The description is JSON and holds what is known of the model."""
    described = describe(tiny_base.model, tiny_base.tokenizer)

    parameters = {id(p): p.numel() for p in tiny_base.model.parameters()}
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert json.loads(json.dumps(described)) == {
        "architecture": "llama",
        "context_length": 256,
        "num_parameters": sum(parameters.values()),
        "vocab_size": 259,
        "linear_modules": [*attention, "gate_proj", "up_proj", "down_proj"],
        "presets": {
            "attention": attention,
            "mlp": ["gate_proj", "up_proj", "down_proj"],
            "all-linear": [*attention, "gate_proj", "up_proj", "down_proj"],
        },
        "chat_template": True,
    }


def test_description_of_opt_125m() -> None:
    """facebook/opt-125m's configuration has 125,534,208 parameters with the 294,912 of an adapter on q and v, r = 8."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(OPTConfig())

    assert describe(model, PreTrainedTokenizerStub())["num_parameters"] == 125_534_208 - 294_912


class PreTrainedTokenizerStub:
    """A tokenizer without a chat template."""

    chat_template = None


def test_tiny_models_are_the_same_on_every_call(tiny_llama: PreTrainedModel, tiny_base: BaseModel) -> None:
    """The fixtures' random weights come from a fixed seed."""
    assert isinstance(tiny_llama.config, LlamaConfig)
    for name, weight in tiny_llama.state_dict().items():
        assert torch.equal(weight, tiny_base.model.state_dict()[name])
