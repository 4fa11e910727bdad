"""Tokens of one answer to text: whole characters only, and nothing from a stop string on."""

import codecs
from collections.abc import Sequence
from typing import Final

from worker.inference.tokens import TokenTable

_CONTEXT_TOKENS: Final = 8
"""Enough of a prompt's end to hold the beginning of a character, and to tell whether there is any text."""


class Detokeniser:
    """Text of a growing token sequence; what it has given is never taken back and holds whole characters.

    All pieces together are what the tokenizer makes of the answer behind its prompt: a first word keeps the space in
    front of it, and a character that the prompt began is completed. Special tokens give no text.
    """

    def __init__(self, table: TokenTable, prompt_ids: Sequence[int]) -> None:
        self._table = table
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        before = b"".join(map(table.text, prompt_ids[-_CONTEXT_TOKENS:]))
        self._characters.decode(before)
        self._at_start = not before

    def add(self, token_id: int) -> str:
        """The characters that this token completes, often none."""
        if self._at_start:
            found = self._table.text_at_start(token_id)
            self._at_start = not self._table.text(token_id)
        else:
            found = self._table.text(token_id)
        return self._characters.decode(found)

    def finish(self) -> str:
        """What is left when no token follows: bytes that never became a character, as U+FFFD."""
        return self._characters.decode(b"", final=True)


class StopScanner:
    """Cuts a stream of text off before the stop string that is whole first, wherever the pieces' borders lie.

    Text that may turn out to begin a stop string is held back until that is known.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        assert all(stop), "an empty stop string stops everything"
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """The text that is now certain to come before any stop string. Nothing more once `stopped`."""
        if self.stopped:
            return ""
        self._held += text
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._give(min(found)[1])
        return self._give(len(self._held) - self._num_doubtful())

    def finish(self) -> str:
        """What was held back, when no text follows."""
        return "" if self.stopped else self._give(len(self._held))

    def _give(self, num_chars: int) -> str:
        given, self._held = self._held[:num_chars], self._held[num_chars:]
        return given

    def _num_doubtful(self) -> int:
        """The length of the longest end of what is held that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0
