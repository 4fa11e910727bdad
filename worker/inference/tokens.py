"""What every token of a tokenizer adds to a text, in bytes."""

import re
import threading
from typing import Any, Final
from weakref import WeakValueDictionary

_NO_CHARACTER: Final = "\ufffd"
"""What decoding gives for bytes that are not (yet) a character."""
_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-F]{2})>")
_ANCHORS_TRIED: Final = 4096


class TokenTable:
    """The bytes of each token, found with the tokenizer when first asked for and remembered.

    A token is measured behind another one, so that the space in front of a word is part of it even where decoding
    drops that at the start of a text. A token that is not whole characters is looked up by its name: byte-level BPE
    writes each byte as one character, sentencepiece as `<0xE2>`. It only decodes, so any thread may ask.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._anchor, self._anchor_text = self._find_anchor()
        self._texts: dict[int, bytes] = {}

    @staticmethod
    def of(tokenizer: Any) -> "TokenTable":
        """The one table of this tokenizer, shared by all who ask while one of them keeps it."""
        with _tables_lock:
            if (table := _tables.get(id(tokenizer))) is None:
                table = _tables[id(tokenizer)] = TokenTable(tokenizer)
            return table

    def text(self, token_id: int) -> bytes:
        """What it adds to a text; nothing for special tokens and for ids that are no token."""
        if (known := self._texts.get(token_id)) is None:
            known = self._texts[token_id] = self._measure(token_id, self._anchor, skip_special_tokens=True)
        return known

    def text_at_start(self, token_id: int) -> bytes:
        """What it adds to an empty text."""
        return self._measure(token_id, [], skip_special_tokens=True)

    def spelled(self, token_id: int) -> bytes:
        """The same as `text`, but special tokens are spelled out."""
        return self.text(token_id) or self._measure(token_id, self._anchor, skip_special_tokens=False)

    def all_texts(self, size: int) -> list[bytes]:
        """`text` of the ids 0 to size - 1, decoded together where the tokenizer can do that."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is not None and hasattr(backend, "decode_batch"):
            texts = backend.decode_batch([[*self._anchor, i] for i in range(size)], skip_special_tokens=True)
            for token_id, text in enumerate(texts):
                whole = text[len(self._anchor_text) :]
                if _NO_CHARACTER not in whole:
                    self._texts.setdefault(token_id, whole.encode())
        return [self.text(token_id) for token_id in range(size)]

    def encode(self, text: str) -> list[int]:
        """The tokens of a text that may be a part of another, nothing added; none where the tokenizer is a slow one."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return [] if backend is None else list(backend.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """The tokenizer's own decoding, nothing cleaned up."""
        return str(
            self._tokenizer.decode(
                token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )

    def _measure(self, token_id: int, anchor: list[int], *, skip_special_tokens: bool) -> bytes:
        name = self._tokenizer.convert_ids_to_tokens(token_id)
        if name is None:
            return b""
        text = self.decode([*anchor, token_id], skip_special_tokens=skip_special_tokens)
        text = text[len(self._anchor_text) if anchor else 0 :]
        if _NO_CHARACTER in text:
            for bytes_of in (_byte_level, _byte_fallback):
                found = bytes_of(str(name))
                if found is not None and found.decode(errors="replace") == text:
                    return found
        return text.encode()

    def _find_anchor(self) -> tuple[list[int], str]:
        """A token that is a plain word or letter, and its text; none if the tokenizer has no such thing."""
        for token_id in range(min(_ANCHORS_TRIED, len(self._tokenizer))):
            text = self.decode([token_id], skip_special_tokens=True)
            name = str(self._tokenizer.convert_ids_to_tokens(token_id))
            if text.isascii() and text.isalnum() and _byte_fallback(name) is None:
                twice = self.decode([token_id, token_id], skip_special_tokens=True)
                if twice.startswith(text) and twice.endswith(text):
                    return [token_id], text
        return [], ""


_tables: WeakValueDictionary[int, TokenTable] = WeakValueDictionary()
"""By the id of the tokenizer, which lives at least as long as its table."""
_tables_lock = threading.Lock()


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's character for each byte: itself where it is visible, else the next one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + k): byte for k, byte in enumerate(hidden)}


_BYTE_OF: Final = _byte_alphabet()


def _byte_level(name: str) -> bytes | None:
    known = [_BYTE_OF.get(character) for character in name]
    return None if None in known else bytes(byte for byte in known if byte is not None)


def _byte_fallback(name: str) -> bytes | None:
    match = _BYTE_TOKEN.fullmatch(name)
    return bytes([int(match[1], 16)]) if match else None
