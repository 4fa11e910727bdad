"""Log-probabilities of tokens as the model itself gives them, before temperature, penalties and cuts."""

# Shapes: V vocabulary.

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shared.specs import GeneratedToken, TokenLogprob
from worker.inference.cuts import largest
from worker.inference.tokens import TokenTable


def of_row(logits_V: NDArray[np.float32], token_id: int, num_top: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """log softmax(logits) of one token, and (id, log softmax) of the `num_top` likeliest, likeliest first."""
    peak = float(logits_V.max())
    log_sum = peak + math.log(float(np.exp(logits_V - np.float32(peak)).sum()))
    if num_top == 0:
        return float(logits_V[token_id]) - log_sum, ()
    ids = largest(logits_V, num_top) if num_top < len(logits_V) else np.arange(len(logits_V))
    ordered = ids[np.argsort(-logits_V[ids], kind="stable")]
    top = tuple((int(i), float(logits_V[i]) - log_sum) for i in ordered)
    return float(logits_V[token_id]) - log_sum, top


def told(table: TokenTable, token_id: int, logprob: float, top: Sequence[tuple[int, float]]) -> GeneratedToken:
    """The same as clients get it, with each token as bytes and as text.

    The bytes are what it adds to the answer's text: a special token is spelled out, but has none.
    """
    return GeneratedToken(
        token=_text(table.spelled(token_id)),
        bytes=list(table.text(token_id)),
        logprob=logprob,
        top=[TokenLogprob(token=_text(table.spelled(i)), bytes=list(table.text(i)), logprob=value) for i, value in top],
    )


def _text(spelled: bytes) -> str:
    return spelled.decode(errors="replace")
