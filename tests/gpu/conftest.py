"""Tests that need a CUDA GPU, `make test-gpu`; without one each is skipped, with the reason."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.worker.conftest import tiny_base_directory, tiny_llama, tiny_tokenizer
from tests.worker.test_attention import make_model
from tests.worker.training.conftest import base_around, engine_for, recorder, train_file, write_lines
from worker.base_model import BaseModel

__all__ = [  # fixtures
    "engine_for", "make_model", "recorder", "tiny_base_directory", "tiny_llama", "tiny_tokenizer", "train_file",
    "write_lines",
]  # fmt: skip

CUDA = torch.device("cuda")
BaseIn = Callable[[torch.dtype], BaseModel]


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    """Skips everything here on a machine without a CUDA GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU, and torch sees none here")


@pytest.fixture
def base_in(tiny_llama: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> BaseIn:
    """base_in(dtype) -> the tiny Llama on the GPU, in that dtype."""

    def make(dtype: torch.dtype) -> BaseModel:
        return replace(base_around(tiny_llama.to(CUDA, dtype), tiny_tokenizer), device=CUDA, dtype=dtype)

    return make


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|, in float64."""
    found, expected = (x.detach().double().cpu() for x in (found, expected))
    return float((found - expected).norm() / expected.norm())
