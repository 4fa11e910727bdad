"""A prepared work directory of `make bench-serve` around a tiny model, so that its programs run in seconds."""

from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.serve.data import prepare
from benchmarks.serve.plan import Plan
from tests.worker.conftest import byte_tokenizer

PROMPTS = ["What is a tide?", "Name five animals, please.", "2 + 2?", "Hello there, who are you?"]
PLAN = Plan(
    threads=1, num_prompts=4, new_tokens=6, repeats=1, store_size=24, zipf_requests=8, cold_requests=4,
    rates=[20.0], open_s=0.5, update_shares={"qv": 1.0, "mixed": 1.5, "linear": 0.5},
)  # fmt: skip
"""Updates about as large as the weights: a tiny random model's choices hardly depend on smaller ones."""


@pytest.fixture(scope="session")
def bench_work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base model, prompts and store."""
    work = tmp_path_factory.mktemp("bench-serve")
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=259, max_position_embeddings=512, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(work / "base")
    byte_tokenizer().save_pretrained(work / "base")
    prepare({"plan": PLAN.to_json(), "work": str(work), "prompts": PROMPTS})
    return work
