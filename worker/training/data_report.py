"""What training sees of a data set: how long its samples are, what of them is lost, and how one of them is learnt."""

# Shapes: S samples that were read.

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any, Final

import torch
from torch import Tensor

BUCKETS: Final = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Upper ends of the histogram's buckets, in tokens; one more holds what is longer."""
MAX_LINES: Final = 10
"""How many lines a report lists of each kind; it counts all of them."""
MAX_RUNS: Final = 8
MAX_RUN_CHARS: Final = 400


@dataclass(frozen=True)
class Bucket:
    """How many samples have at most `max_tokens` tokens, and more than the bucket before; None is without bound."""

    max_tokens: int | None
    num_samples: int


@dataclass(frozen=True)
class Run:
    """Consecutive tokens of a sample, decoded, that are all labels or all not."""

    text: str
    is_label: bool


@dataclass(frozen=True)
class Example:
    """One sample as training sees it. `is_whole` says that nothing was left out to keep it short."""

    line: int
    runs: list[Run]
    is_whole: bool


@dataclass(frozen=True)
class DataReport:
    """What training sees of a file. Tokens are counted after truncation and without dropped samples."""

    num_samples: int
    num_used: int
    num_truncated: int
    """Samples that lose labels because they are too long, dropped ones included."""
    num_dropped: int
    """Samples without any label within the longest sequence; they would teach nothing."""
    num_duplicates: int
    """Samples whose tokens and labels are those of an earlier one; they are trained on all the same."""
    num_tokens: int
    num_label_tokens: int
    label_share: float
    longest: int
    median: int
    histogram: list[Bucket]
    """All samples by the tokens that they need, before truncation: what `max_seq_len` would cut and what not."""
    truncated_lines: list[int]
    dropped_lines: list[int]
    duplicate_lines: list[int]
    example: Example | None
    """A sample of the file, the first that is not truncated if there is one."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class SampleFacts:
    """Of each sample that was read: its line, the tokens it needs up to its last label, a hash, whether it is used.

    Flat arrays, 17 bytes a sample.
    """

    def __init__(self) -> None:
        self.lines = array("i")
        self.lengths = array("i")
        self.hashes = array("q")
        self.is_used = bytearray()

    def __len__(self) -> int:
        return len(self.lines)

    def add(self, line: int, ids: Sequence[int], is_label: Sequence[bool], *, length: int, is_used: bool) -> None:
        self.lines.append(line)
        self.lengths.append(length)
        digest = blake2b(array("i", ids).tobytes() + bytes(is_label), digest_size=8).digest()
        self.hashes.append(int.from_bytes(digest, "little", signed=True))
        self.is_used.append(is_used)

    def used(self) -> list[int]:
        """Indices of the samples that are used, which is how a data set counts them."""
        return [i for i, is_used in enumerate(self.is_used) if is_used]

    def select(self, indices: Iterable[int]) -> "SampleFacts":
        """The facts of some of these samples, in the order given."""
        chosen = SampleFacts()
        for i in indices:
            chosen.lines.append(self.lines[i])
            chosen.lengths.append(self.lengths[i])
            chosen.hashes.append(self.hashes[i])
            chosen.is_used.append(self.is_used[i])
        return chosen


def report_on(
    facts: SampleFacts, starts: Sequence[int], num_label_tokens: int, *, longest: int, example: Example | None
) -> DataReport:
    """The report on samples of which the used ones lie at `starts`; `longest` is the most tokens a sample may have."""
    lengths = torch.tensor(facts.lengths, dtype=torch.int64)
    sizes = torch.tensor(starts, dtype=torch.int64).diff()
    num_tokens = int(sizes.sum())
    too_long, dropped = lengths > longest, torch.tensor(list(facts.is_used), dtype=torch.int64) == 0
    duplicate = _is_duplicate(torch.tensor(facts.hashes, dtype=torch.int64))
    return DataReport(
        num_samples=len(facts),
        num_used=len(sizes),
        num_truncated=int(too_long.sum()),
        num_dropped=int(dropped.sum()),
        num_duplicates=int(duplicate.sum()),
        num_tokens=num_tokens,
        num_label_tokens=num_label_tokens,
        label_share=num_label_tokens / num_tokens if num_tokens else 0.0,
        longest=int(sizes.max()) if len(sizes) else 0,
        median=int(sizes.median()) if len(sizes) else 0,
        histogram=_histogram(lengths),
        truncated_lines=_lines(facts, too_long),
        dropped_lines=_lines(facts, dropped),
        duplicate_lines=_lines(facts, duplicate),
        example=example,
    )


def example_of(tokenizer: Any, line: int, ids: Sequence[int], is_label: Sequence[bool]) -> Example:
    """One sample decoded, in runs of labels and others; long runs lose their middle and many runs their end."""
    ids = list(ids)
    starts = [k for k in range(len(ids)) if k == 0 or is_label[k] != is_label[k - 1]]
    shown = starts[:MAX_RUNS]
    ends = [*starts[1:], len(ids)][: len(shown)]
    runs, at = [], 0
    for start, end in zip(shown, ends, strict=True):
        # From the front each time: some decoders write a first token's leading space only if it is not the first.
        text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if end < len(ids):
            text = text.rstrip("\ufffd")  # the rest of this character comes with the next run
        runs.append(Run(_short(text[at:]), bool(is_label[start])))
        at = len(text)
    is_whole = len(shown) == len(starts) and all(len(run.text) <= MAX_RUN_CHARS for run in runs)
    return Example(line, runs, is_whole)


def _short(text: str) -> str:
    if len(text) <= MAX_RUN_CHARS:
        return text
    half = MAX_RUN_CHARS // 2
    return f"{text[:half]} ... {text[-half:]}"


def _is_duplicate(hashes_S: Tensor) -> Tensor:
    """Bools (S,): whether an earlier sample has the same hash."""
    ordered_S, order_S = hashes_S.sort(stable=True)
    is_same_S = torch.zeros_like(hashes_S, dtype=torch.bool)
    is_same_S[order_S[1:]] = ordered_S[1:] == ordered_S[:-1]
    return is_same_S


def _histogram(lengths_S: Tensor) -> list[Bucket]:
    counts = torch.bucketize(lengths_S, torch.tensor(BUCKETS)).bincount(minlength=len(BUCKETS) + 1).tolist()
    return [Bucket(end, count) for end, count in zip([*BUCKETS, None], counts, strict=True)]


def _lines(facts: SampleFacts, is_meant_S: Tensor) -> list[int]:
    return [facts.lines[i] for i in is_meant_S.nonzero()[:MAX_LINES, 0].tolist()]
