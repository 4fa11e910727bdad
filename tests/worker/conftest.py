"""Tiny real models: random weights from a fixed seed, 2 layers, 32 wide, float32, in eval mode and not frozen."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests.shared.conftest import World
from tests.worker.job_runs import world_on
from tests.worker.training.conftest import base_around
from worker import attention
from worker.base_model import BaseModel, digest_directory, load_base_model
from worker.training.engine import TrainingEngine

BOS, START, END = "<s>", "<|im_start|>", "<|im_end|>"
SPECIAL = (BOS, START, END)
VOCAB_SIZE = len(SPECIAL) + 256
TOKEN_IDS = {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": None}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of this configuration, the same on every call; disturbs no random state."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention.NAME).eval()


def llama_config() -> LlamaConfig:
    return LlamaConfig(
        **TOKEN_IDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )


@pytest.fixture
def tiny_llama() -> PreTrainedModel:
    """Llama: rotary positions, 4 query heads on 2 key-value heads, tied head."""
    return random_model(llama_config())


@pytest.fixture
def tiny_opt() -> PreTrainedModel:
    """OPT: learned positions, biases, tied head."""
    return random_model(
        OPTConfig(
            **TOKEN_IDS,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            init_std=0.2,
            dropout=0.0,
        )
    )


@pytest.fixture
def tiny_gpt2() -> PreTrainedModel:
    """GPT-2: Conv1D layers, learned positions, tied head."""
    return random_model(
        GPT2Config(
            **TOKEN_IDS,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=256,
            initializer_range=0.2,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
        )
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(BPE(vocab={token: i for i, token in enumerate([*SPECIAL, *alphabet])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, `<s>` 0 (never added unasked), `<|im_start|>` 1, `<|im_end|>` 2 = end; a ChatML template."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_base_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama and the tokenizer as a safetensors directory; read only, copy it to change it."""
    directory = tmp_path_factory.mktemp("tiny-base")
    random_model(llama_config()).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def tiny_base(tiny_base_directory: Path) -> BaseModel:
    """The tiny Llama as both engines get it: loaded from disk, frozen, on the CPU in float32."""
    return load_base_model(
        tiny_base_directory,
        name="tiny",
        digest=digest_directory(tiny_base_directory),
        device="cpu",
        dtype="float32",
    )


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Where a test's service keeps its data; not made yet."""
    return tmp_path / "data"


@pytest.fixture
def source(tiny_base_directory: Path, tmp_path: Path) -> Path:
    """A model directory to import, or to damage first."""
    return Path(shutil.copytree(tiny_base_directory, tmp_path / "source"))


@pytest.fixture
def base(tiny_llama: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> BaseModel:
    """The tiny Llama as a base model."""
    return base_around(tiny_llama, tiny_tokenizer)


@pytest.fixture
def learner(base: BaseModel) -> Iterator[TrainingEngine]:
    """A training engine over it."""
    learner = TrainingEngine(base, max_tokens=4096)
    yield learner
    learner.close()


@pytest.fixture
def world(fresh_sqlite_url: str, data_dir: Path) -> Iterator[World]:
    """A ledger and store with data to train on, on SQLite."""
    world = world_on(fresh_sqlite_url, data_dir)
    yield world
    world.engine.dispose()
