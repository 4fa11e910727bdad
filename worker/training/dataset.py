"""Training files as tokens with label marks, and the order in which an epoch sees them."""

# Shapes: S samples that are used, T tokens of them all.

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from shared.data_format import Conversation, Pair, Sample, Text, read_samples
from shared.errors import InvalidRequest, InvalidTrainingFile
from shared.specs import TrainSpec
from worker.encoding import ChatEncoder, ChatTokens, Rendering, encode_pairs, encode_prompts
from worker.training.data_report import DataReport, Example, SampleFacts, example_of, report_on

__all__ = ["DataReport", "Marked", "TokenisedDataset", "Tokeniser", "epoch_order", "pack", "split"]

BATCH_SAMPLES: Final = 256
BATCH_CHARS: Final = 1 << 18
"""Samples and characters that are tokenised in one call; what the tokenizer gives for them is held at once."""

Marked = tuple[list[int], list[bool]]
"""Token ids, and for each whether it is a label: to be predicted from the tokens before it."""


@dataclass(frozen=True)
class TokenisedDataset:
    """All samples in one flat run of tokens: sample i is tokens[starts[i] : starts[i + 1]]. int32, bool; on the CPU."""

    tokens: Tensor
    is_label: Tensor
    starts: Sequence[int]
    report: DataReport
    digest: str
    """SHA-256 of the file, in hex."""
    facts: SampleFacts
    """Of all samples that were read, dropped ones too."""
    longest: int
    """The most tokens a sample may have; longer ones were truncated."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Token ids and label marks of one sample, views."""
        span = slice(self.starts[index], self.starts[index + 1])
        return self.tokens[span], self.is_label[span]

    def num_tokens(self, index: int) -> int:
        return self.starts[index + 1] - self.starts[index]

    def num_labels(self, index: int) -> int:
        return int(self[index][1].sum())


class Tokeniser:
    """Samples to marked tokens, as one base model and one spec want them.

    A reply or completion is labelled with the token that ends it; `train_on` "all", and plain text, label every token.
    The first token never is a label, since nothing comes before it. Too long samples lose their end.
    """

    def __init__(self, tokenizer: Any, eos_token_ids: frozenset[int], spec: TrainSpec, *, longest: int) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        own = tokenizer.eos_token_id
        self._end = own if own in eos_token_ids else min(eos_token_ids)
        self._label_all = spec.train_on == "all"
        self._longest = min(longest, spec.max_seq_len)
        self._chat: ChatEncoder | None = None

    def read(self, path: Path, *, between_samples: Callable[[], None] = lambda: None) -> TokenisedDataset:
        """The whole file; raises InvalidTrainingFile naming the line, or saying that there is nothing to learn.

        `between_samples` is called before each sample and may raise to end the reading.
        """

        collected = _Collector(self._longest)
        for batch in _batches(read_samples(path), between_samples):
            for sample, marked in zip(batch, self._mark_all(batch), strict=True):
                collected.add(sample.line, *marked)
        return collected.dataset(self._tokenizer, digest=_sha256(path))

    def mark(self, sample: Sample) -> Marked:
        """Tokens and labels of one sample, at whatever length; raises InvalidTrainingFile naming its line."""
        return self._mark_all([sample])[0]

    def _mark_all(self, samples: Sequence[Sample]) -> list[Marked]:
        """`mark` of samples of one format, in few calls of the tokenizer."""
        if self._tokenizer.chat_template is None:
            samples = [s.without_template or s if isinstance(s, Conversation) else s for s in samples]
        conversations = [s for s in samples if isinstance(s, Conversation)]
        pairs = [s for s in samples if isinstance(s, Pair)]
        texts = [s for s in samples if isinstance(s, Text)]
        assert len(samples) in (len(conversations), len(pairs), len(texts))
        marked = [*self._mark_conversations(conversations), *self._mark_pairs(pairs), *self._mark_texts(texts)]
        if self._label_all:
            marked = [(ids, [True] * len(ids)) for ids, _ in marked]
        return [(ids, [False, *is_label[1:]]) for ids, is_label in marked]

    def _mark_texts(self, samples: Sequence[Text]) -> list[Marked]:
        encoded = map(self._closed, encode_prompts(self._tokenizer, [s.text for s in samples]))
        return [(ids, [True] * len(ids)) for ids in encoded]

    def _mark_pairs(self, samples: Sequence[Pair]) -> list[Marked]:
        marked: list[Marked] = []
        for prompt, completion in encode_pairs(self._tokenizer, [(s.prompt, s.completion) for s in samples]):
            closed = self._closed(completion)
            marked.append((prompt + closed, [False] * len(prompt) + [True] * len(closed)))
        return marked

    def _closed(self, ids: list[int]) -> list[int]:
        """`ids` with an end, which whoever writes special tokens may have written already."""
        return ids if ids and ids[-1] in self._eos_token_ids else [*ids, self._end]

    def _mark_conversations(self, samples: Sequence[Conversation]) -> list[Marked]:
        if not samples:
            return []
        renderings = [self._render(sample) for sample in samples]
        return list(map(self._mark_conversation, samples, self._encoder().tokenise(renderings)))

    def _render(self, sample: Conversation) -> Rendering:
        try:
            return self._encoder().render([turn.message for turn in sample.turns])
        except InvalidRequest as error:
            raise InvalidTrainingFile(f"line {sample.line}: {error.message}", param="training_file") from error

    def _encoder(self) -> ChatEncoder:
        if self._chat is None:
            self._chat = ChatEncoder(self._tokenizer, self._eos_token_ids)
        return self._chat

    def _mark_conversation(self, sample: Conversation, encoded: ChatTokens) -> Marked:
        learnt = {i for i, turn in enumerate(sample.turns) if turn.is_learnt and turn.message.role == "assistant"}
        ids = encoded.ids
        is_label = [reply in learnt for reply in encoded.reply_of]
        last = max(i for i, turn in enumerate(sample.turns) if turn.message.role == "assistant")
        if last not in encoded.closed:
            end = 1 + max((k for k, reply in enumerate(encoded.reply_of) if reply == last), default=len(ids) - 1)
            ids, is_label = [*ids[:end], self._end], [*is_label[:end], last in learnt]
        return ids, is_label


def split(data: TokenisedDataset, *, share: float, seed: int) -> tuple[TokenisedDataset, TokenisedDataset]:
    """(train, held out): about `share` of the samples, at least one, are held out; the same ones for the same seed.

    Both keep the file's order, digest and example. Samples that were dropped are counted with the training half.
    Raises InvalidTrainingFile where either half would be empty.
    """
    num_held_out = max(1, round(share * len(data)))
    if num_held_out >= len(data):
        raise InvalidTrainingFile(
            f"a validation split of {share:g} needs at least one sample to train on and one to hold out, "
            f"and {len(data)} of {data.report.num_samples} samples can be used",
            param="training_file",
        )
    is_held_out_S = torch.zeros(len(data), dtype=torch.bool)
    is_held_out_S[_permutation(len(data), f"split/{seed}")[:num_held_out]] = True
    held_out = {i for i, is_held_out in zip(data.facts.used(), is_held_out_S.tolist(), strict=True) if is_held_out}
    return (
        _part(data, ~is_held_out_S, data.facts.select(i for i in range(len(data.facts)) if i not in held_out)),
        _part(data, is_held_out_S, data.facts.select(sorted(held_out))),
    )


def epoch_order(num_samples: int, *, seed: int, epoch: int) -> list[int]:
    """A permutation of all samples that depends on (seed, epoch) only, so that a resumed job needs no state for it."""
    return _permutation(num_samples, f"{seed}/{epoch}")


def _permutation(length: int, key: str) -> list[int]:
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    return torch.randperm(length, generator=generator).tolist()


def pack(indices: Sequence[int], num_tokens: Callable[[int], int], *, max_tokens: int) -> list[list[int]]:
    """Consecutive runs of `indices` with at most `max_tokens` tokens each; a longer sample goes alone."""
    runs: list[list[int]] = []
    room = 0
    for index in indices:
        size = num_tokens(index)
        if not runs or size > room:
            runs.append([])
            room = max_tokens
        runs[-1].append(index)
        room -= size
    return runs


def _batches(samples: Iterable[Sample], between_samples: Callable[[], None]) -> Iterator[list[Sample]]:
    """Runs of samples that are tokenised together; a single one may be longer than BATCH_CHARS."""
    batch: list[Sample] = []
    num_chars = 0
    for sample in samples:
        between_samples()
        size = _num_chars(sample)
        if batch and (len(batch) == BATCH_SAMPLES or num_chars + size > BATCH_CHARS):
            yield batch
            batch, num_chars = [], 0
        batch.append(sample)
        num_chars += size
    if batch:
        yield batch


def _num_chars(sample: Sample) -> int:
    match sample:
        case Conversation():
            return sum(len(turn.message.content) for turn in sample.turns)
        case Pair():
            return len(sample.prompt) + len(sample.completion)
        case Text():
            return len(sample.text)


class _Collector:
    """Marked samples, one after the other, into flat arrays."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._tokens, self._labels, self._starts = array("i"), bytearray(), array("q", [0])
        self._facts = SampleFacts()

    def add(self, line: int, ids: list[int], is_label: list[bool]) -> None:
        length = _labelled_length(is_label)
        # Whatever follows the last label cannot change the loss.
        kept = length if length <= self._longest else _labelled_length(is_label[: self._longest])
        self._facts.add(line, ids, is_label, length=length, is_used=kept > 0)
        if kept:
            self._tokens.extend(ids[:kept])
            self._labels.extend(is_label[:kept])
            self._starts.append(len(self._tokens))

    def dataset(self, tokenizer: Any, *, digest: str) -> TokenisedDataset:
        """All that was added; raises InvalidTrainingFile if nothing of it has a label."""
        if not self._tokens:
            raise InvalidTrainingFile(
                f"there is nothing to learn: none of {len(self._facts)} samples has a label "
                f"in its first {self._longest} tokens",
                param="training_file",
            )
        example = self._example(tokenizer)
        return TokenisedDataset(
            tokens=torch.frombuffer(self._tokens, dtype=torch.int32),
            is_label=torch.frombuffer(self._labels, dtype=torch.bool),
            starts=self._starts,
            report=report_on(self._facts, self._starts, sum(self._labels), longest=self._longest, example=example),
            digest=digest,
            facts=self._facts,
            longest=self._longest,
        )

    def _example(self, tokenizer: Any) -> Example:
        used = self._facts.used()
        at = next((k for k, i in enumerate(used) if self._facts.lengths[i] <= self._longest), 0)
        span = slice(self._starts[at], self._starts[at + 1])
        is_label = [bool(label) for label in self._labels[span]]
        return example_of(tokenizer, self._facts.lines[used[at]], self._tokens[span], is_label)


def _labelled_length(is_label: Sequence[bool]) -> int:
    """Tokens up to and including the last label; 0 without one."""
    return next((k for k in range(len(is_label), 0, -1) if is_label[k - 1]), 0)


def _part(data: TokenisedDataset, is_kept_S: Tensor, facts: SampleFacts) -> TokenisedDataset:
    """The samples that are kept, a copy; `is_kept_S` says it for each of the data set's S samples."""
    sizes_S = torch.tensor(data.starts, dtype=torch.int64).diff()
    is_kept_T = is_kept_S.repeat_interleave(sizes_S)
    starts = array("q", accumulate(sizes_S[is_kept_S].tolist(), initial=0))
    is_label = data.is_label[is_kept_T]
    return TokenisedDataset(
        tokens=data.tokens[is_kept_T],
        is_label=is_label,
        starts=starts,
        report=report_on(facts, starts, int(is_label.sum()), longest=data.longest, example=data.report.example),
        digest=data.digest,
        facts=facts,
        longest=data.longest,
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
