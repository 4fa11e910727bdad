"""Text and conversations as token ids: one place, so that what was trained on is what generation asks with.

Two kinds of text. A raw prompt may hold special tokens, since whoever writes one writes the template too. The content
of a chat message is plain text whatever it holds: `<|im_end|>` typed by a user ends nothing.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from shared.errors import InvalidRequest
from shared.specs import Message


@dataclass(frozen=True)
class ChatTokens:
    """A rendered conversation. Token k is part of reply messages[reply_of[k]], end of turn included, or of none."""

    ids: list[int]
    reply_of: list[int | None]
    closed: frozenset[int]
    """Replies that end with a token that ends generation; one that is not here needs such a token appended."""


@dataclass(frozen=True)
class _Span:
    start: int
    end: int


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Token ids of raw text that starts a sequence: the tokenizer's own prefix (BOS) once, special tokens parsed."""
    return encode_prompts(tokenizer, [text])[0]


def encode_prompts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """`encode_prompt` of each text, in one call of the tokenizer."""
    prefix = _prefix(tokenizer)
    return [ids if ids[: len(prefix)] == prefix else prefix + ids for ids in _encode(tokenizer, texts)]


def encode_continuation(tokenizer: Any, text: str) -> list[int]:
    """Token ids of raw text without any token added."""
    return _encode(tokenizer, [text])[0]


def encode_pair(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Ids of a prompt, exactly as `encode_prompt` gives them, and of the completion that continues it.

    The completion's ids are those of the joint text where the prompt's are a prefix of these, which keeps a tokenizer
    from starting the completion as a new sequence; where a merge crosses the joint, the completion is encoded alone.
    """
    return encode_pairs(tokenizer, [(prompt, completion)])[0]


def encode_pairs(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """`encode_pair` of each (prompt, completion), in two calls of the tokenizer."""
    texts = [*(prompt for prompt, _ in pairs), *(prompt + completion for prompt, completion in pairs)]
    encoded = encode_prompts(tokenizer, texts)
    firsts, joints = encoded[: len(pairs)], encoded[len(pairs) :]
    merged = [k for k, (first, joint) in enumerate(zip(firsts, joints, strict=True)) if joint[: len(first)] != first]
    alone = dict(zip(merged, _encode(tokenizer, [pairs[k][1] for k in merged]), strict=True))
    return [
        (first, alone[k] if k in alone else joint[len(first) :])
        for k, (first, joint) in enumerate(zip(firsts, joints, strict=True))
    ]


def _encode(tokenizer: Any, texts: Sequence[str], **options: bool) -> list[list[int]]:
    """Token ids of each text; a fast tokenizer takes many at once in parallel and gives what it gives one by one."""
    return _call(tokenizer, texts, **options)["input_ids"] if texts else []


def _call(tokenizer: Any, texts: Sequence[str], **options: bool) -> Any:
    return tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, **options
    )


def _prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text by itself: BOS, or nothing."""
    plain = encode_continuation(tokenizer, "a")
    dressed = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    for at in range(len(dressed) - len(plain) + 1):
        if dressed[at : at + len(plain)] == plain:
            return dressed[:at]
    return []


class _Spans:
    """Spans in order that do not overlap, to be searched."""

    def __init__(self, spans: Iterable[_Span]) -> None:
        both = [(span.start, span.end) for span in spans]
        self._starts, self._ends = [start for start, _ in both], [end for _, end in both]

    def meet(self, token: tuple[int, int]) -> bool:
        """Whether one of them begins before the token ends and ends after it begins."""
        return bisect_right(self._ends, token[0]) < bisect_left(self._starts, token[1])

    def holder(self, at: int) -> int | None:
        """Which of them `at` lies in."""
        k = bisect_right(self._starts, at) - 1
        return k if k >= 0 and at < self._ends[k] else None


@dataclass(frozen=True)
class Rendering:
    """A conversation as its template writes it: where in `text` its contents and its replies stand, both in order."""

    text: str
    contents: tuple[_Span, ...]
    replies: dict[int, _Span]
    closed: frozenset[int]


@dataclass(frozen=True)
class _Layout:
    """What the template writes around the contents of a conversation with given roles, learnt with marks for contents.

    `pieces[i]` stands before content i, the last piece after the last content. For a reply i, `lead[i]` characters of
    `pieces[i]` come after what a generation prompt ends with, and the turn ends `tail[i]` characters into
    `pieces[i + 1]`; `tail[i]` is None where the template has no token there that ends a turn.
    """

    pieces: tuple[str, ...]
    lead: dict[int, int]
    tail: dict[int, int | None]


class ChatEncoder:
    """Conversations to token ids through the tokenizer's own chat template. One tokenizer, one thread at a time.

    `encode` is `render` and then `tokenise`, which takes many renderings at once.

    A reply is what follows the generation prompt, up to and including the first token that ends a turn. Special tokens
    count only where the template wrote them; those that a content spells are replaced by the ids of their characters.
    """

    def __init__(self, tokenizer: Any, eos_token_ids: frozenset[int]) -> None:
        if tokenizer.chat_template is None:
            raise InvalidRequest("this base model has no chat template: use prompts instead of messages")
        self._tokenizer = tokenizer
        specials = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special_ids = frozenset(specials)
        self._specials = tuple(specials.values())
        self._ends = tuple(text for i, text in specials.items() if i in eos_token_ids)
        self._layout = lru_cache(maxsize=1024)(self._learn_layout)

    def encode(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> ChatTokens:
        """Token ids of a conversation; raises InvalidRequest where the template refuses it."""
        return self.tokenise([self.render(messages, add_generation_prompt=add_generation_prompt)])[0]

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> Rendering:
        """The conversation as the template writes it; raises InvalidRequest where the template refuses it."""
        text = self._render([_plain(m) for m in messages], add_generation_prompt)
        layout = self._layout(tuple(m.role for m in messages), add_generation_prompt)
        contents = None if layout is None else _locate(text, layout.pieces, [m.content for m in messages])
        if layout is not None and contents is not None:
            replies = {
                i: _Span(contents[i].start - layout.lead[i], contents[i].end + (layout.tail[i] or 0))
                for i in layout.lead
            }
            closed = {i for i, tail in layout.tail.items() if tail is not None}
        else:
            contents = []
            self._refuse_special_tokens(messages)
            replies, closed = self._compare_prefixes(messages, text)
        return Rendering(text, tuple(contents), replies, frozenset(closed))

    def tokenise(self, renderings: Sequence[Rendering]) -> list[ChatTokens]:
        """Token ids of conversations that this encoder has rendered, in one call of the tokenizer."""
        encoded = _call(self._tokenizer, [r.text for r in renderings], return_offsets_mapping=True)
        return list(map(self._attribute, renderings, encoded["input_ids"], encoded["offset_mapping"]))

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise InvalidRequest(f"the model's chat template refuses this conversation: {error}") from error
        return str(text)

    def _learn_layout(self, roles: tuple[str, ...], add_generation_prompt: bool) -> _Layout | None:
        """The layout for these roles; None if the template does not write each content once and in order."""
        marked = [{"role": role, "content": f"\ue000{i}\ue001"} for i, role in enumerate(roles)]
        text = self._render(marked, add_generation_prompt)
        pieces, begins, rest = [], [], text
        for message in marked:
            piece, mark, rest = rest.partition(message["content"])
            if not mark or mark in rest:
                return None
            begins.append(len(text) - len(rest) - len(mark))
            pieces.append(piece)
        pieces.append(rest)
        if "\ue000" in "".join(pieces):
            return None
        replies = [i for i, role in enumerate(roles) if role == "assistant"]
        return _Layout(
            pieces=tuple(pieces),
            lead={i: self._lead(marked[:i], text, begins[i], len(pieces[i])) for i in replies},
            tail={i: self._turn_end(pieces[i + 1]) for i in replies},
        )

    def _lead(self, before: list[dict[str, str]], text: str, begin: int, piece_chars: int) -> int:
        """How many characters the template writes between a generation prompt and the reply's content at `begin`."""
        try:
            prompt = self._render(before, True)
        except InvalidRequest:  # for instance no template renders nothing at all; the reply is then its content
            return 0
        lead = begin - len(prompt)
        return lead if text.startswith(prompt) and 0 <= lead <= piece_chars else 0

    def _turn_end(self, piece: str) -> int | None:
        """Where in `piece`, after at most white space, the first token that ends a turn stops."""
        blank = len(piece) - len(piece.lstrip())
        ends = [blank + len(token) for token in self._ends if piece.startswith(token, blank)]
        return max(ends, default=None)

    def _refuse_special_tokens(self, messages: Sequence[Message]) -> None:
        found = sorted({s for s in self._specials for m in messages if s in m.content})
        if found:
            raise InvalidRequest(
                "the model's chat template rewrites contents, so these may not hold special tokens: " + ", ".join(found)
            )

    def _compare_prefixes(self, messages: Sequence[Message], text: str) -> tuple[dict[int, _Span], set[int]]:
        """Replies, and which of them are closed, where the template treats contents by what they say.

        Reply i is what rendering messages[:i + 1] adds to the generation prompt of messages[:i]; both begin `text`.
        """
        replies, closed = {}, set()
        plain = [_plain(m) for m in messages]
        for i in (i for i, m in enumerate(messages) if m.role == "assistant"):
            prompt, turn = self._render(plain[:i], True), self._render(plain[: i + 1], False)
            if not (text.startswith(prompt) and text.startswith(turn) and turn.startswith(prompt)):
                raise InvalidRequest(
                    f"the model's chat template rewrites the reply in messages[{i}] once the conversation goes on; "
                    "split it into conversations that each end with their reply"
                )
            at, end = max(((turn.rfind(e), e) for e in self._ends), default=(-1, ""))
            if at >= len(prompt):
                closed.add(i)
            replies[i] = _Span(len(prompt), at + len(end) if i in closed else len(turn.rstrip()))
        return replies, closed

    def _attribute(self, rendering: Rendering, ids: list[int], offsets: list[tuple[int, int]]) -> ChatTokens:
        """Whose each token is. Offsets never go back, so all tokens of a span are found by two searches.

        Plain tokens go by their ends, since byte-level tokenizers cut leading spaces out of the offsets; special ones
        by their starts, since some take the white space behind them in.
        """
        ends = [end for _, end in offsets]
        reply_of: list[int | None] = [None] * len(ids)
        for i, span in rendering.replies.items():
            first, last = bisect_right(ends, span.start), bisect_right(ends, span.end)
            reply_of[first:last] = [i] * (last - first)
        contents, replies = _Spans(rendering.contents), _Spans(rendering.replies.values())
        spelt: dict[int, list[int]] = {}
        for k in [k for k, token in enumerate(ids) if token in self._special_ids]:
            if contents.meet(offsets[k]):
                spelt[k] = self._spell(ids[k], rendering.text[slice(*offsets[k])])
            else:
                at = replies.holder(offsets[k][0])
                reply_of[k] = None if at is None else list(rendering.replies)[at]
        if spelt:
            reply_of = [of for k, of in enumerate(reply_of) for _ in spelt.get(k, (0,))]
            ids = [new for k, token in enumerate(ids) for new in spelt.get(k, (token,))]
        return ChatTokens(ids=ids, reply_of=reply_of, closed=rendering.closed)

    def _spell(self, special_id: int, text: str) -> list[int]:
        """Ids of a special token's text as plain characters."""
        ids = _encode(self._tokenizer, [text], split_special_tokens=True)[0]
        if special_id not in ids:
            return ids
        # Some vocabularies hold the whole text as an ordinary piece too; single characters cannot meet it.
        return [i for c in text for i in encode_continuation(self._tokenizer, c)]


def _plain(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.content}


def _locate(text: str, pieces: tuple[str, ...], contents: list[str]) -> list[_Span] | None:
    """Where each content stands in `text`, verbatim or stripped, between `pieces`; None if `text` is anything else."""
    spans: list[_Span] = []
    at = len(pieces[0])
    if not text.startswith(pieces[0]):
        return None
    for i, (content, piece) in enumerate(zip(contents, pieces[1:], strict=True)):
        is_last = i == len(contents) - 1
        for form in (content, content.strip(), content.rstrip(), content.lstrip()):
            end = at + len(form)
            if text.startswith(form + piece, at) and (not is_last or len(text) == end + len(piece)):
                spans.append(_Span(at, end))
                at = end + len(piece)
                break
        else:
            return None
    return spans
