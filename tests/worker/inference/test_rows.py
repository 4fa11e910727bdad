"""How much of prompts a step reads."""

import pytest

from worker.inference.rows import GPU_MOST_TOKENS, MOST_TOKENS, PromptBudget


@pytest.mark.parametrize(("on_gpu", "most"), [(False, MOST_TOKENS), (True, GPU_MOST_TOKENS)])
def test_a_step_in_which_nobody_waits_reads_the_most(on_gpu: bool, most: int) -> None:
    """Beside rows that decode it reads less, once prompts have been seen to take long."""
    budget = PromptBudget(on_gpu=on_gpu)
    assert budget.tokens(num_reading=1, num_decoding=0) == most

    budget.learn(10.0, num_decoding=0, num_prompt_tokens=most)

    assert 0 < budget.tokens(num_reading=1, num_decoding=8) < most


def test_a_gpu_reads_more_beside_others_than_a_cpu() -> None:
    """Before anything is known and after the same was seen."""
    cpu, gpu = PromptBudget(), PromptBudget(on_gpu=True)

    for budget in (cpu, gpu):
        budget.learn(0.04, num_decoding=8, num_prompt_tokens=512)

    assert cpu.tokens(num_reading=8, num_decoding=8) == MOST_TOKENS
    assert gpu.tokens(num_reading=8, num_decoding=8) > MOST_TOKENS
