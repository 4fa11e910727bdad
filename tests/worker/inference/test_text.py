"""Tokens to text: whole characters, the prompt's last space, stop strings."""

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from tests.worker.conftest import byte_tokenizer
from tests.worker.inference.test_tokens import byte_fallback_tokenizer
from worker.inference.text import Detokeniser, StopScanner
from worker.inference.tokens import TokenTable

PROPERTY = settings(derandomize=True, deadline=None)
TEXT = "naïve 😀 日本語 \U0001f469‍\U0001f680 end"
BYTE_LEVEL, BYTE_FALLBACK = TokenTable.of(byte_tokenizer()), TokenTable.of(byte_fallback_tokenizer())
ID_OF_BYTE = {BYTE_LEVEL.text(i)[0]: i for i in range(3, 259)}


def tokens_of(data: bytes, table: TokenTable) -> list[int]:
    """One token per byte."""
    return [ID_OF_BYTE[byte] if table is BYTE_LEVEL else 2 + byte for byte in data]


def told(table: TokenTable, token_ids: list[int]) -> list[str]:
    """The pieces of an answer, and what is left at its end."""
    detokeniser = Detokeniser(table, tokens_of(b"x", table))
    return [*(detokeniser.add(i) for i in token_ids), detokeniser.finish()]


@pytest.mark.parametrize("table", [BYTE_LEVEL, BYTE_FALLBACK])
@PROPERTY
@given(data=st.binary(max_size=40))
def test_any_bytes_come_out_as_they_decode(table: TokenTable, data: bytes) -> None:
    """Random bytes, most of them no UTF-8: nothing is lost, doubled or taken back."""
    assert "".join(told(table, tokens_of(data, table))) == data.decode(errors="replace")


@pytest.mark.parametrize("table", [BYTE_LEVEL, BYTE_FALLBACK])
@PROPERTY
@given(text=st.text(max_size=20))
def test_each_character_comes_with_its_last_byte(table: TokenTable, text: str) -> None:
    """Not later, so that a stream is live, and not in part."""
    pieces = told(table, tokens_of(text.encode(), table))

    assert [piece for piece in pieces if piece] == list(text)
    assert pieces[-1] == ""


@PROPERTY
@given(data=st.binary(max_size=40))
def test_bytes_come_out_as_the_tokenizer_decodes_the_whole(data: bytes) -> None:
    """The tokenizer that a client has at home makes the same text of the same tokens."""
    ids = tokens_of(data, BYTE_LEVEL)

    assert "".join(told(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids, skip_special_tokens=True)


def test_a_character_that_the_prompt_began_is_completed(tiny_tokenizer: Any) -> None:
    """A prompt of token ids may end inside a character; the answer's first byte then makes it whole."""
    first, second = tiny_tokenizer("é", add_special_tokens=False)["input_ids"]

    assert Detokeniser(TokenTable.of(tiny_tokenizer), [first]).add(second) == "é"


def test_a_first_word_has_no_space_in_front_where_no_text_precedes_it() -> None:
    """After BOS alone the answer is the whole text, and the tokenizer starts a text without the space."""
    bos, once, a = 0, 258, 259
    detokeniser = Detokeniser(BYTE_FALLBACK, [bos])

    assert [detokeniser.add(i) for i in (bos, once, a)] == ["", "Once", " a"]


def test_no_character_is_split(tiny_tokenizer: Any) -> None:
    """With one token per byte, pieces come only at the ends of characters, and together are the text."""
    ids = tiny_tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    detokeniser = Detokeniser(TokenTable.of(tiny_tokenizer), tiny_tokenizer("prompt é")["input_ids"])

    pieces = [detokeniser.add(i) for i in ids]

    assert len(ids) > len(TEXT)
    assert [piece for piece in pieces if piece] == list(TEXT)
    assert detokeniser.finish() == ""


def test_bytes_that_never_become_a_character_come_at_the_end(tiny_tokenizer: Any) -> None:
    """An answer cut off inside a character ends as the tokenizer decodes it, in one U+FFFD; nothing is lost before."""
    ids = tiny_tokenizer("ab😀", add_special_tokens=False)["input_ids"][:-1]
    detokeniser = Detokeniser(TokenTable.of(tiny_tokenizer), [])

    pieces = [detokeniser.add(i) for i in ids]

    assert "".join(pieces) == "ab"
    assert detokeniser.finish() == "\ufffd"


def test_bytes_that_are_no_character_do_not_hide_what_follows(tiny_tokenizer: Any) -> None:
    """After a stray byte the text goes on, and the whole is what the tokenizer decodes."""
    stray = tiny_tokenizer("é", add_special_tokens=False)["input_ids"][:1]
    ids = [*stray, *tiny_tokenizer("né", add_special_tokens=False)["input_ids"]]
    detokeniser = Detokeniser(TokenTable.of(tiny_tokenizer), [])

    text = "".join(detokeniser.add(i) for i in ids) + detokeniser.finish()

    assert text == tiny_tokenizer.decode(ids) == "\ufffdné"


def test_special_tokens_give_no_text(tiny_tokenizer: Any) -> None:
    """A special token in the middle of an answer is not shown and disturbs nothing."""
    ids = tiny_tokenizer("a<|im_start|>é", add_special_tokens=False)["input_ids"]
    detokeniser = Detokeniser(TokenTable.of(tiny_tokenizer), [])

    assert "".join(detokeniser.add(i) for i in ids) == "aé"


@pytest.fixture
def spaced_tokenizer() -> Any:
    """Words with their leading space as "▁", which decoding drops at the start of a text, as Llama 2's does."""
    words = ["▁Once", "▁upon", "▁a", "▁time", "x"]
    inner = Tokenizer(BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False)


def test_the_space_before_the_first_word_is_kept(spaced_tokenizer: Any) -> None:
    """An answer that continues a prompt with a new word begins with the space between them."""
    detokeniser = Detokeniser(TokenTable.of(spaced_tokenizer), [0, 1])

    pieces = [detokeniser.add(i) for i in (2, 3, 4)]

    assert pieces == [" a", " time", "x"]
    assert spaced_tokenizer.decode([2, 3, 4]) == "a timex", "the tokenizer drops no space, so this proves nothing"


@PROPERTY
@given(
    text=st.text(alphabet="ab", max_size=30),
    stop=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4),
    cuts=st.lists(st.integers(0, 30), max_size=10),
)
def test_stop_strings_cut_any_text_wherever_its_pieces_end(text: str, stop: list[str], cuts: list[int]) -> None:
    """Up to the stop string that is whole first, and of those that are then whole the longest; else all of it."""
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[begin:end] for begin, end in itertools.pairwise(borders)]
    found = [(at + len(one), at) for one in stop if (at := text.find(one)) >= 0]

    given, stopped = shown(stop, pieces)

    assert stopped == bool(found)
    assert "".join(given) == (text[: min(found)[1]] if found else text)


def shown(stop: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    """What a scanner lets through of each piece, and at the end if no stop string came; and whether one did."""
    scanner = StopScanner(stop)
    given = [scanner.add(piece) for piece in pieces]
    return [*given, scanner.finish()], scanner.stopped


def test_a_stop_string_over_three_pieces_is_found() -> None:
    """Nothing of it is let through, nor what follows it."""
    assert shown(["STOP"], ["ab S", "TO", "P cd", "ef"]) == (["ab ", "", "", "", ""], True)


def test_what_only_begins_a_stop_string_is_held_back_until_known() -> None:
    """It comes out with the piece that decides against it, and not before."""
    assert shown(["STOP"], ["ab S", "T", "ART"]) == (["ab ", "", "START", ""], False)


def test_what_is_held_back_at_the_end_is_shown() -> None:
    """An answer that ends on the beginning of a stop string has it in its text."""
    assert shown(["STOP"], ["ab ST"]) == (["ab ", "ST"], False)


def test_a_beginning_inside_a_failed_beginning_is_found() -> None:
    """The stop string may begin inside text that looked like its beginning."""
    assert shown(["aab"], ["a", "a", "a", "b"]) == (["", "", "a", "", ""], True)


def test_the_earliest_of_several_stop_strings_counts() -> None:
    """Whatever their order in the request."""
    assert shown(["late", "x"], ["one x two late"]) == (["one ", ""], True)


def test_without_stop_strings_everything_passes_at_once() -> None:
    """Nothing is held back for nothing."""
    assert shown([], ["a", "b"]) == (["a", "b", ""], False)
