"""Log-probabilities of an answer's tokens in OpenAI's two dialects."""

import codecs

from api.schemas.completion_views import ChatLogprobs, ChosenToken, LikelyToken, TextLogprobs
from shared.specs import GeneratedToken, TokenLogprob


class Places:
    """Where the tokens of one choice begin in its text, however few of them come at a time."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_chars = 0

    def next(self, token: TokenLogprob) -> int:
        """How many whole characters came before this token, which is the next one."""
        place = self._num_chars
        self._num_chars += len(self._decoder.decode(bytes(token.bytes)))
        return place


def in_chat(tokens: list[GeneratedToken] | None) -> ChatLogprobs | None:
    """As chat completions say it; None if nobody asked."""
    if tokens is None:
        return None
    return ChatLogprobs(
        content=[
            ChosenToken(
                token=one.token,
                logprob=one.logprob,
                bytes=one.bytes,
                top_logprobs=[LikelyToken.of(likely) for likely in one.top],
            )
            for one in tokens
        ]
    )


def in_text(tokens: list[GeneratedToken] | None, places: Places) -> TextLogprobs | None:
    """As raw completions say it; None if nobody asked. `places` knows the tokens before."""
    if tokens is None:
        return None
    return TextLogprobs(
        tokens=[_written(one) for one in tokens],
        token_logprobs=[one.logprob for one in tokens],
        top_logprobs=[_by_text(one) for one in tokens],
        text_offset=[places.next(one) for one in tokens],
    )


def _by_text(token: GeneratedToken) -> dict[str, float]:
    """The likeliest tokens and the chosen one; of two that are written alike the likelier counts."""
    found: dict[str, float] = {}
    for one in (*token.top, token):
        found.setdefault(_written(one), one.logprob)
    return found


def _written(token: TokenLogprob) -> str:
    """The token's text, or its bytes where they are no text by themselves."""
    raw = bytes(token.bytes)
    try:
        raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
    return token.token
