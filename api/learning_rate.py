"""The learning rate of a job that names none, and what a learning_rate_multiplier multiplies."""

from typing import Final

REFERENCE_LEARNING_RATE: Final = 2e-4
"""What a learning_rate_multiplier of 1 means, whatever the model; so a multiplier says the same in every answer."""

_SMALLEST_KNOWN: Final = 10**8
_SHORT_RUN_STEPS: Final = 100


def auto_learning_rate(num_parameters: int, total_steps: int) -> float:
    """The rate that `auto` stands for: 5e-4 (1e9 / N)^(1/4) for a base of N parameters, to two digits.

    - LoRA wants about 10 times the rate of full fine-tuning, nearly whatever its rank, since s = alpha / r makes up
      for that: 5e-4 is 10 times 5e-5.
    - Larger models want less: the fit over Llama and Qwen is (2000 / H)^0.78 for a hidden size H, and N grows with
      about H^3. This form differs from that one by at most 10 % from 1 to 70 billion parameters.
    - In runs of fewer than 100 steps the factor over full fine-tuning is about 15 rather than 10: B starts at zero.
    - Below 1e8 parameters nobody has measured, so smaller models count as 1e8.

    Source: Schulman et al. 2025, "LoRA Without Regret"; Tinker documentation, "Supervised learning hyperparameters".
    """
    rate = 5e-4 * (1e9 / max(num_parameters, _SMALLEST_KNOWN)) ** 0.25
    return float(f"{rate * (1.5 if total_steps < _SHORT_RUN_STEPS else 1.0):.2g}")
