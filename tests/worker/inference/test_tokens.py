"""The bytes of tokens, for tokenizers of every kind that the supported architectures have."""

import gc
import weakref
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from tests.worker.conftest import byte_tokenizer
from worker.inference.tokens import TokenTable


@pytest.fixture
def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2, Mistral, Gemma and Phi-3 have it: words with "▁" for a space, `<0xE2>` for a byte."""
    return byte_fallback_tokenizer()


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    names = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁Once", "▁a", "x", "▁", "é"]
    inner = Tokenizer(BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def test_byte_level_tokens_are_their_bytes(tiny_tokenizer: Any) -> None:
    """Encoding any text and putting the tokens' bytes together gives its UTF-8; half characters are no exception."""
    table = TokenTable.of(tiny_tokenizer)

    for text in ("plain", "naïve 😀", " \n\t\x00\xa0\xad", "日本"):
        ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(map(table.text, ids)) == text.encode()


def test_every_byte_of_a_byte_level_tokenizer_has_its_token(tiny_tokenizer: Any) -> None:
    """The 256 tokens that are not special are the 256 bytes."""
    table = TokenTable.of(tiny_tokenizer)

    assert {table.text(i) for i in range(3, 259)} == {bytes([byte]) for byte in range(256)}


def test_byte_fallback_tokens_are_their_bytes(fallback_tokenizer: Any) -> None:
    """Each `<0x..>` is one byte, whether or not that is a character."""
    table = TokenTable.of(fallback_tokenizer)

    assert [table.text(2 + byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]


def test_words_keep_the_space_in_front_of_them(fallback_tokenizer: Any) -> None:
    """Which decoding drops at the start of a text, and only there."""
    table = TokenTable.of(fallback_tokenizer)
    once, a, x, space, e_acute = range(258, 263)

    assert [table.text(i) for i in (once, a, x, space, e_acute)] == [b" Once", b" a", b"x", b" ", "é".encode()]
    assert table.text_at_start(once) == b"Once"
    assert table.text_at_start(x) == b"x"


@pytest.mark.parametrize("make", [byte_tokenizer, byte_fallback_tokenizer])
def test_special_tokens_have_no_text_but_a_spelling(make: Any) -> None:
    """An answer does not show them; log-probabilities name them."""
    table = TokenTable.of(make())

    assert table.text(0) == b""
    assert table.spelled(0) == b"<s>"


def test_an_id_that_is_no_token_has_no_text(tiny_tokenizer: Any) -> None:
    """Models may have more rows than their tokenizer has tokens."""
    table = TokenTable.of(tiny_tokenizer)

    assert (table.text(5000), table.spelled(5000)) == (b"", b"")


@pytest.mark.parametrize("make", [byte_tokenizer, byte_fallback_tokenizer])
def test_all_texts_at_once_are_the_texts_one_by_one(make: Any) -> None:
    """Including rows behind the last token."""
    size = len(make()) + 3

    together = TokenTable.of(make()).all_texts(size)

    table = TokenTable.of(make())
    assert together == [table.text(i) for i in range(size)]


def test_a_tokenizer_has_one_table_while_it_is_used(tiny_tokenizer: Any) -> None:
    """Two who ask share what was measured; nobody keeps a table that nobody uses."""
    table = TokenTable.of(tiny_tokenizer)
    gone = weakref.ref(table)

    assert TokenTable.of(tiny_tokenizer) is table
    del table
    gc.collect()
    assert gone() is None
