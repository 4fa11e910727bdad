"""Training files as tokens with label marks, and the order in which an epoch sees them."""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.data_format import Conversation, Pair, Sample, Text, read_samples
from shared.errors import InvalidRequest, InvalidTrainingFile
from shared.specs import TrainSpec
from worker.encoding import ChatEncoder, encode_pair, encode_prompt

Marked = tuple[list[int], list[bool]]
"""Token ids, and for each whether it is a label: to be predicted from the tokens before it."""


@dataclass(frozen=True)
class DataReport:
    """What training sees of a file. Tokens are counted after truncation and without dropped samples."""

    num_samples: int
    num_used: int
    num_truncated: int
    num_dropped: int
    """Samples without any label within the longest sequence; they would teach nothing."""
    num_tokens: int
    num_label_tokens: int
    longest: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class TokenisedDataset:
    """All samples in one flat run of tokens: sample i is tokens[starts[i] : starts[i + 1]]. int32, bool; on the CPU."""

    tokens: Tensor
    is_label: Tensor
    starts: Sequence[int]
    report: DataReport
    digest: str
    """SHA-256 of the file, in hex."""

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

        def marked() -> Iterator[Marked]:
            for sample in read_samples(path):
                between_samples()
                yield self.mark(sample)

        return _collect(marked(), self._longest, _sha256(path))

    def mark(self, sample: Sample) -> Marked:
        """Tokens and labels of one sample, at whatever length."""
        try:
            match sample:
                case Conversation():
                    ids, is_label = self._mark_conversation(sample)
                case Pair():
                    ids, is_label = self._mark_pair(sample)
                case Text():
                    ids = self._closed(encode_prompt(self._tokenizer, sample.text))
                    is_label = [True] * len(ids)
        except InvalidTrainingFile:
            raise
        except InvalidRequest as error:
            raise InvalidTrainingFile(f"line {sample.line}: {error.message}", param="training_file") from error
        if self._label_all:
            is_label = [True] * len(ids)
        return ids, [False, *is_label[1:]]

    def _mark_pair(self, sample: Pair) -> Marked:
        prompt, completion = encode_pair(self._tokenizer, sample.prompt, sample.completion)
        completion = self._closed(completion)
        return prompt + completion, [False] * len(prompt) + [True] * len(completion)

    def _closed(self, ids: list[int]) -> list[int]:
        """`ids` with an end, which whoever writes special tokens may have written already."""
        return ids if ids and ids[-1] in self._eos_token_ids else [*ids, self._end]

    def _mark_conversation(self, sample: Conversation) -> Marked:
        if self._chat is None:
            self._chat = ChatEncoder(self._tokenizer, self._eos_token_ids)
        encoded = self._chat.encode([turn.message for turn in sample.turns])
        learnt = [turn.is_learnt and turn.message.role == "assistant" for turn in sample.turns]
        ids = encoded.ids
        is_label = [reply is not None and learnt[reply] for reply in encoded.reply_of]
        last = max(i for i, turn in enumerate(sample.turns) if turn.message.role == "assistant")
        if last not in encoded.closed:
            end = 1 + max((k for k, reply in enumerate(encoded.reply_of) if reply == last), default=len(ids) - 1)
            ids, is_label = [*ids[:end], self._end], [*is_label[:end], learnt[last]]
        return ids, is_label


def epoch_order(num_samples: int, *, seed: int, epoch: int) -> list[int]:
    """A permutation of all samples that depends on (seed, epoch) only, so that a resumed job needs no state for it."""
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    return torch.randperm(num_samples, generator=generator).tolist()


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


def _collect(marked: Iterable[Marked], longest: int, digest: str) -> TokenisedDataset:
    tokens, labels, starts = array("i"), bytearray(), array("q", [0])
    num_samples = num_truncated = num_dropped = 0
    for ids, is_label in marked:
        num_samples += 1
        num_truncated += len(ids) > longest
        last_label = max((k for k, label in enumerate(is_label[:longest]) if label), default=None)
        if last_label is None:
            num_dropped += 1
            continue
        # Whatever follows the last label cannot change the loss.
        tokens.extend(ids[: last_label + 1])
        labels.extend(is_label[: last_label + 1])
        starts.append(len(tokens))
    report = DataReport(
        num_samples=num_samples,
        num_used=num_samples - num_dropped,
        num_truncated=num_truncated,
        num_dropped=num_dropped,
        num_tokens=len(tokens),
        num_label_tokens=sum(labels),
        longest=max((end - start for start, end in pairwise(starts)), default=0),
    )
    if not report.num_used:
        raise InvalidTrainingFile(
            f"there is nothing to learn: none of {num_samples} samples has a label in its first {longest} tokens",
            param="training_file",
        )
    return TokenisedDataset(
        tokens=torch.frombuffer(tokens, dtype=torch.int32),
        is_label=torch.frombuffer(labels, dtype=torch.bool),
        starts=starts,
        report=report,
        digest=digest,
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
