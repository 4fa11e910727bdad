"""Tokens of one answer to text: whole characters only, and nothing from a stop string on."""

from collections.abc import Sequence
from typing import Any, Final

_UNFINISHED: Final = "\ufffd"
"""What a tokenizer decodes to where the bytes so far are not (yet) a character."""
_CONTEXT_TOKENS: Final = range(4, 12)


class Detokeniser:
    """Text of a growing token sequence; what it has given is never taken back and holds whole characters.

    The prompt's last tokens are decoded along, since many tokenizers drop the space before a text's first word. Special
    tokens give no text. All pieces together are what the tokenizer makes of the whole answer.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._pending = self._context(list(prompt_ids))
        self._num_known = len(self._pending)
        self._given = self._decode(self._pending)

    def add(self, token_id: int) -> str:
        """The characters that this token completes, often none."""
        self._pending.append(token_id)
        text = self._decode(self._pending)
        settled = text.rstrip(_UNFINISHED)
        new = settled[len(self._given) :]
        if settled == text and new:
            # The tokens just told become the context of the next ones; those before them are not needed any more.
            self._pending = self._pending[self._num_known :]
            self._num_known = len(self._pending)
            self._given = self._decode(self._pending)
        else:
            self._given += new
        return new

    def finish(self) -> str:
        """What is left when no token follows: bytes that never became a character, as U+FFFD."""
        return self._decode(self._pending)[len(self._given) :]

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def _context(self, ids: list[int]) -> list[int]:
        """The prompt's last tokens, not beginning inside a character; none if that cannot be had."""
        for count in _CONTEXT_TOKENS:
            if _UNFINISHED not in self._decode(ids[-count:]):
                return ids[-count:]
        return []


class StopScanner:
    """Cuts a stream of text off at the first stop string, wherever the pieces' borders lie.

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
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._give(min(found))
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
