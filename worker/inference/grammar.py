"""response_format: which tokens may come next so that an answer is JSON, or JSON that a schema accepts."""

# Shapes: V vocabulary.

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final

import llguidance
import numpy as np
from numpy.typing import NDArray

from shared import limits
from shared.errors import InvalidRequest, Unavailable
from shared.specs import ResponseFormat
from worker.inference.grammar_trial import PARSER_LIMITS, problem_of
from worker.inference.tokens import TokenTable

_PARAM: Final = "response_format"
_KEPT: Final = 32
"""Compiled grammars; a hostile one takes some 20 MB at the parser's limits, an ordinary one far less than 1 MB."""
_QUICK_S: Final = 0.05
_PATIENCE_S: Final = 20.0
_BUSY: Final = "the generator is too busy to compile a new schema; try again"
_WHITESPACE: Final = r"[\x20\x0A\x0D\x09]{1,32}"
"""Between the parts of a document. Without a bound, small models that like to indent do not come back."""


class GrammarState:
    """One sequence on its way through a grammar. The engine's thread moves it on."""

    def __init__(self, grammar: "Grammar") -> None:
        self._grammar = grammar
        self._matcher = grammar.copy()
        self._token_ids: list[int] = []

    def mask(self, logits_V: NDArray[np.float32]) -> None:
        """Put -inf in the place of every token that may not come next; EOS may where the document is whole.

        Raises InvalidRequest where following the schema takes more than the limits.
        """
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            self._start_again()
            bits = self._matcher.compute_bitmask()
            self._check()
        allowed_V = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little", count=len(logits_V)).astype(bool)
        allowed_V[self._grammar.eos_token_ids] = self._matcher.is_accepting()
        logits_V[~allowed_V] = -np.inf

    def add(self, token_id: int) -> None:
        """The sequence has got this token, which `mask` allowed. Raises InvalidRequest as `mask` does."""
        self._token_ids.append(token_id)
        if not self._matcher.consume_token(token_id):
            self._start_again()

    @property
    def is_complete(self) -> bool:
        """True if the document is whole and nothing but its end can follow."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def _start_again(self) -> None:
        """Follow a grammar whose automaton is empty again: that of all sequences together may be what is too large."""
        if self._grammar.renew():
            self._matcher = self._grammar.copy()
            self._matcher.consume_tokens(self._token_ids)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = _shown(self._matcher.get_error())
            raise InvalidRequest(f"the schema is too complex to follow: {reason}", param=_PARAM)


class Grammar:
    """A compiled response format; any number of sequences may follow it at once.

    They share an automaton that grows with what they meet, up to a limit, and is then begun anew.
    """

    def __init__(self, make: Callable[[], llguidance.LLMatcher], eos_token_ids: Sequence[int]) -> None:
        self.eos_token_ids = list(eos_token_ids)
        self._make = make
        self._lock = threading.Lock()
        started_s = time.perf_counter()
        self._matcher = make()
        self._compile_s = time.perf_counter() - started_s
        self.is_spent = False

    def start(self) -> GrammarState:
        """A sequence that has nothing yet."""
        return GrammarState(self)

    def copy(self) -> llguidance.LLMatcher:
        """The library's own state of such a sequence."""
        with self._lock:
            return self._matcher.deep_copy()

    def renew(self) -> bool:
        """Begin the automaton anew, True; or leave it to the next request where that is too slow for the engine."""
        self.is_spent = self._compile_s > _QUICK_S
        if not self.is_spent:
            with self._lock:
                self._matcher = self._make()
        return not self.is_spent


class GrammarCompiler:
    """Response formats of one base model to grammars, the last ones of which are kept. Any thread may ask.

    A schema that is new is compiled by one thread at a time, and is first tried in a process that can be ended.
    """

    def __init__(self, table: TokenTable, *, vocabulary_size: int, eos_token_ids: frozenset[int]) -> None:
        self._table = table
        self._vocabulary_size = vocabulary_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._kept: OrderedDict[str, Grammar | str] = OrderedDict()
        self._lock = threading.Lock()
        self._compiling = threading.Lock()

    def compile(self, wanted: ResponseFormat) -> Grammar:
        """The grammar. Raises InvalidRequest that says why a schema cannot be followed, Unavailable when too busy."""
        text = _checked({"type": "object"} if wanted.json_schema is None else wanted.json_schema)
        if (known := self._known(text)) is None:
            if not self._compiling.acquire(timeout=_PATIENCE_S):
                raise Unavailable(_BUSY, param=_PARAM)
            try:
                if (known := self._known(text)) is None:
                    known = self._compile(text, is_ours=wanted.json_schema is None)
                    self._keep(text, known)
            finally:
                self._compiling.release()
        if isinstance(known, str):
            raise _refused(known)
        return known

    def _known(self, text: str) -> Grammar | str | None:
        """A grammar or refusal that is kept and of use, which is now the last used."""
        with self._lock:
            known = self._kept.get(text)
            if known is None or (isinstance(known, Grammar) and known.is_spent):
                return None
            self._kept.move_to_end(text)
            return known

    def _keep(self, text: str, made: Grammar | str) -> None:
        with self._lock:
            self._kept[text] = made
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)

    def _compile(self, text: str, *, is_ours: bool) -> Grammar | str:
        """The grammar of a schema, or why it has none."""
        if self._tokenizer is None:
            vocabulary = _Vocabulary(self._table, self._vocabulary_size, self._eos_token_ids)
            self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(vocabulary))
            vocabulary.fallback = self._tokenizer.greedy_tokenize
        try:
            source = llguidance.LLMatcher.grammar_from_json_schema(
                text, overrides={"whitespace_pattern": _WHITESPACE, "lenient": False, "coerce_one_of": False}
            )
            if not is_ours and (problem := problem_of(source)) is not None:
                return problem
        except ValueError as error:
            return str(error)
        except TimeoutError as error:
            raise Unavailable(_BUSY, param=_PARAM) from error
        make = partial(llguidance.LLMatcher, self._tokenizer, source, log_level=0, limits=PARSER_LIMITS)
        grammar = Grammar(make, self._eos_token_ids)
        return str(grammar.copy().get_error()) or grammar


class _Vocabulary:
    """The tokens of a base model as llguidance wants to see them."""

    bos_token_id: int | None = None

    def __init__(self, table: TokenTable, size: int, eos_token_ids: Sequence[int]) -> None:
        self.tokens = table.all_texts(size)
        self.special_token_ids = [token_id for token_id, text in enumerate(self.tokens) if not text]
        self.eos_token_id = eos_token_ids[0]
        self.table = table
        self.fallback: Callable[[str], list[int]] = table.encode

    def __call__(self, text: str) -> list[int]:
        """The tokens of text that must come next: its bytes exactly, whatever the tokenizer adds or normalises."""
        ids = self.table.encode(text)
        is_exact = b"".join(self.tokens[token_id] for token_id in ids) == text.encode()
        return ids if is_exact else self.fallback(text)


def _checked(schema: Mapping[str, object]) -> str:
    """A schema as text, its keys in the order given, which is the order of an answer's properties."""
    if "x-guidance" in schema:
        raise _refused("'x-guidance' is no keyword of JSON Schema")
    if _depth(schema) > limits.JSON_DEPTH:
        raise _refused(f"it is nested more than {limits.JSON_DEPTH} deep")
    text = json.dumps(schema)
    if len(text) > limits.MAX_SCHEMA_CHARS:
        raise _refused(f"it has {len(text)} characters; at most {limits.MAX_SCHEMA_CHARS} are allowed")
    return text


def _depth(value: object) -> int:
    """How many containers lie within each other, at most one more than is allowed."""
    level: list[object] = [value]
    for depth in range(limits.JSON_DEPTH + 2):
        level = [inner for outer in level if isinstance(outer, dict | list) for inner in _parts(outer)]
        if not level:
            return depth
    return limits.JSON_DEPTH + 1


def _parts(container: dict[str, object] | list[object]) -> list[object]:
    return list(container.values()) if isinstance(container, dict) else container


def _refused(reason: str) -> InvalidRequest:
    return InvalidRequest(f"the JSON schema cannot be followed: {_shown(reason)}", param=_PARAM)


def _shown(reason: str) -> str:
    """A reason of the library's on one line, without advice about options that nobody has here."""
    if reason.startswith("oneOf constraints are not supported"):
        reason = "these alternatives of oneOf are not known to exclude each other; anyOf is possible"
    return " ".join(reason.removesuffix("<non-verbose/>").split())[:300]
