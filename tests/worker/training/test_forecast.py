"""How many steps a job has: the trainer counts as the API does when it takes the job."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from shared import limits
from tests.worker.training.conftest import spec_of
from worker.training.dataset import Tokeniser
from worker.training.forecast import num_steps


@pytest.mark.parametrize(
    ("changes", "steps"),
    [({"n_epochs": 2}, 2 * 2001), ({"n_epochs": 2, "max_steps": 5}, 5), ({"n_epochs": 50}, limits.MAX_STEPS)],
)
def test_steps_in_all(
    changes: dict[str, int], steps: int, tiny_tokenizer: PreTrainedTokenizerFast, write_lines: Callable[..., Path]
) -> None:
    """`max_steps`, else all epochs, but never more than a job may have."""
    spec = spec_of(batch_size=1, **changes)
    tokeniser = Tokeniser(tiny_tokenizer, frozenset({tiny_tokenizer.eos_token_id}), spec, longest=256)
    data = tokeniser.read(write_lines([{"text": "a"}] * 2001), between_samples=lambda: None)

    assert num_steps(data, spec) == (2001, steps)
