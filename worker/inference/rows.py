"""What the engine computes next: whose tokens, how many of each prompt, and who waits."""

from collections.abc import Sequence
from typing import Final

from worker.inference.answer import Choice
from worker.inference.forward import Piece

STALL_S: Final = 0.08
"""How long reading one prompt may hold up the next token of many others, in a step. With more prompts to read it is
longer in proportion, since then most of those that wait do so for their first token."""
FEWEST_TOKENS: Final = 32
MOST_TOKENS: Final = 512
"""Of prompts, in one step: fewer would cost more to start than to compute, more leave the caches."""
GPU_FEWEST_TOKENS: Final = 512
GPU_MOST_TOKENS: Final = 4096
"""The same on a GPU, which computes hundreds of tokens while the processor starts the kernels for one."""


class Row:
    """A choice with a row of the cache. `num_read` tokens of its prompt are in it; `number` tells who came first."""

    def __init__(self, choice: Choice, number: int) -> None:
        self.choice = choice
        self.number = number
        self.num_read = 0

    @property
    def decodes(self) -> bool:
        return self.num_read == len(self.choice.prompt.ids)

    def piece(self, row: int, most_tokens: int) -> Piece:
        """What the next step reads of it: its last token, or up to so many tokens of its prompt."""
        choice = self.choice
        if self.decodes:
            return Piece(row, choice.token_ids[-1:], choice.adapters)
        ids = choice.prompt.ids[self.num_read : self.num_read + most_tokens]
        return Piece(row, ids, choice.adapters, wants_next=self.num_read + len(ids) == len(choice.prompt.ids))


class PromptBudget:
    """How many tokens of prompts one step may read: as many as take `STALL_S`, times one more than there are prompts to
    read for every row that decodes.

    Learnt from the steps that were: seconds of a step = seconds of a step without prompts + tokens * seconds a token.
    """

    def __init__(self, *, on_gpu: bool = False) -> None:
        self._fewest, self._most = FEWEST_TOKENS, MOST_TOKENS
        if on_gpu:
            self._fewest, self._most = GPU_FEWEST_TOKENS, GPU_MOST_TOKENS
        self._decode_s: float | None = None
        self._token_s: float | None = None

    def tokens(self, *, num_reading: int, num_decoding: int) -> int:
        if not num_decoding:
            return self._most
        if self._token_s is None:
            return 4 * self._fewest
        stall_s = STALL_S * (1 + num_reading / num_decoding)
        return max(self._fewest, min(self._most, int(stall_s / self._token_s)))

    def learn(self, seconds: float, *, num_decoding: int, num_prompt_tokens: int) -> None:
        if not num_prompt_tokens:
            self._decode_s = _averaged(self._decode_s, seconds)
        elif num_prompt_tokens >= self._fewest:
            alone_s = (self._decode_s or 0.0) if num_decoding else 0.0
            self._token_s = _averaged(self._token_s, max(seconds - alone_s, 1e-7) / num_prompt_tokens)


def plan(rows: Sequence[Row], budget: PromptBudget) -> list[Piece]:
    """The pieces of the next step: a token for each row that decodes, and of the prompts, oldest row first, as many
    tokens as the budget has."""
    pieces = [row.piece(number, 1) for number, row in enumerate(rows) if row.decodes]
    reading = sorted((row.number, number) for number, row in enumerate(rows) if not row.decodes)
    left = budget.tokens(num_reading=len(reading), num_decoding=len(pieces))
    for _, number in reading:
        if left <= 0:
            break
        piece = rows[number].piece(number, left)
        left -= len(piece.token_ids)
        pieces.append(piece)
    return pieces


def _averaged(before: float | None, now: float) -> float:
    return now if before is None else 0.8 * before + 0.2 * now
