"""Loading base models: what is taken, what is refused and why, and what the loaded model promises."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from shared.errors import SettingsError
from worker import base_model
from worker.base_model import (
    BaseModel,
    bfloat16_speedup,
    choose_device,
    choose_dtype,
    context_length,
    describe,
    digest_directory,
    load_base_model,
)


def load(directory: Path) -> BaseModel:
    return load_base_model(directory, name="tiny", digest="d", device="cpu", dtype="float32")


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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


def test_dtype_is_not_the_checkpoints(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A float16 checkpoint is loaded in what the CPU is fast in, not in the dtype it happens to have."""
    monkeypatch.setattr(base_model, "bfloat16_speedup", lambda: 1.0)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16, local_files_only=True)
    model.save_pretrained(source)

    base = load_base_model(source, name="tiny", digest="d", device="cpu")

    assert {t.dtype for t in load_file(source / "model.safetensors").values()} == {torch.float16}
    assert base.dtype == torch.float32
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}


def test_dtype_asked_for_is_given(source: Path) -> None:
    """bfloat16 is there for who asks for it."""
    base = load_base_model(source, name="tiny", digest="d", device="cpu", dtype="bfloat16")

    assert {p.dtype for p in base.model.parameters()} == {base.dtype} == {torch.bfloat16}


@pytest.mark.parametrize(("speedup", "expected"), [(4.0, torch.bfloat16), (0.6, torch.float32)])
def test_a_cpu_computes_in_the_dtype_it_is_fast_in(
    monkeypatch: pytest.MonkeyPatch, speedup: float, expected: torch.dtype
) -> None:
    """In bfloat16 where that pays; asking for float32 still gives float32."""
    monkeypatch.setattr(base_model, "bfloat16_speedup", lambda: speedup)

    assert choose_dtype(torch.device("cpu"), "auto") == expected
    assert choose_dtype(torch.device("cpu"), "float32") == torch.float32


def test_bfloat16_speedup_agrees_with_the_processor() -> None:
    """The short measurement says the same as the processor's own list of instructions, where Linux shows it."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        pytest.skip("no /proc/cpuinfo")
    if "avx512_bf16" not in flags and "amx_bf16" not in flags:
        pytest.skip("a processor without bfloat16 products")

    assert bfloat16_speedup() >= 1.5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_a_wrong_setting() -> None:
    """Asking for CUDA where there is none is one clear error; 'auto' takes the CPU."""
    assert choose_device("auto").type == "cpu"
    with pytest.raises(SettingsError, match="LORAD_DEVICE=cuda, but torch sees no CUDA device"):
        choose_device("cuda")


def test_every_end_token_counts(source: Path) -> None:
    """Ends named by the generation configuration count beside the tokenizer's own."""
    edit_json(source / "generation_config.json", eos_token_id=[7, 9])

    assert load(source).eos_token_ids == {2, 7, 9}


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


def test_digest_changes_with_a_byte(source: Path) -> None:
    """One flipped bit in the weights gives another digest; undone, the old one."""
    before = digest_directory(source)
    path = source / "model.safetensors"
    content = bytearray(path.read_bytes())

    content[-1] ^= 1
    path.write_bytes(content)
    flipped = digest_directory(source)
    content[-1] ^= 1
    path.write_bytes(content)

    assert flipped != before
    assert digest_directory(source) == before


def test_digest_changes_with_a_name(source: Path) -> None:
    """The same bytes under another name give another digest."""
    before = digest_directory(source)

    (source / "tokenizer.json").rename(source / "tokenizer2.json")

    assert digest_directory(source) != before


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
