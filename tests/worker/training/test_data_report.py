"""What the report says about a data set is what an own count over its samples says."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from shared.data_format import read_samples
from tests.worker.training.conftest import spec_of
from worker.training.data_report import BUCKETS, MAX_LINES, MAX_RUN_CHARS, MAX_RUNS, Run, SampleFacts, report_on
from worker.training.dataset import DataReport, Marked, Tokeniser

Lines = Callable[..., Path]
Report = Callable[..., DataReport]


def tokeniser(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> Tokeniser:
    return Tokeniser(tokenizer, frozenset({tokenizer.eos_token_id}), spec_of(**changes), longest=256)


@pytest.fixture
def report(tiny_tokenizer: PreTrainedTokenizerFast, write_lines: Lines) -> Report:
    """report(objects, **changes) -> what training would see of them."""

    def of(objects: list[dict[str, Any]], **changes: Any) -> DataReport:
        return tokeniser(tiny_tokenizer, **changes).read(write_lines(objects)).report

    return of


def pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def counted(marked: list[Marked], max_seq_len: int) -> dict[str, Any]:
    """The report's numbers and lines, counted one by one in plain Python."""
    lengths = [max(k + 1 for k, label in enumerate(is_label) if label) for _, is_label in marked]
    first_labels = [is_label.index(True) for _, is_label in marked]
    kept = [i for i, first in enumerate(first_labels) if first < max_seq_len]
    sizes = [max(k + 1 for k, label in enumerate(marked[i][1][:max_seq_len]) if label) for i in kept]
    labels = sum(sum(marked[i][1][:max_seq_len]) for i in kept)
    buckets = [next((end for end in BUCKETS if length <= end), None) for length in lengths]
    lines = {
        "truncated": [i + 1 for i, length in enumerate(lengths) if length > max_seq_len],
        "dropped": [i + 1 for i in range(len(marked)) if i not in kept],
        "duplicate": [i + 1 for i in range(len(marked)) if marked[i] in marked[:i]],
    }
    return {
        "num_samples": len(marked),
        "num_used": len(kept),
        **{f"num_{what}{'s' if what == 'duplicate' else ''}": len(found) for what, found in lines.items()},
        **{f"{what}_lines": found[:MAX_LINES] for what, found in lines.items()},
        "num_tokens": sum(sizes),
        "num_label_tokens": labels,
        "label_share": labels / sum(sizes),
        "longest": max(sizes),
        "median": statistics.median_low(sizes),
        "histogram": [{"max_tokens": end, "num_samples": buckets.count(end)} for end in [*BUCKETS, None]],
    }


texts = st.text("ab", max_size=14)


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(texts, texts.filter(bool)), min_size=1, max_size=25), max_seq_len=st.integers(8, 40))
def test_report_is_what_counting_says(
    pairs: list[tuple[str, str]],
    max_seq_len: int,
    tiny_tokenizer: PreTrainedTokenizerFast,
    write_lines: Lines,
) -> None:
    """Every number and every list of lines is what going through the samples one by one gives."""
    path = write_lines([pair("", "a"), *(pair(*p) for p in pairs)])
    made = tokeniser(tiny_tokenizer, max_seq_len=max_seq_len)
    told = made.read(path).report.to_json()
    told.pop("example")

    assert told == counted([made.mark(sample) for sample in read_samples(path)], max_seq_len)


def test_only_a_few_lines_are_listed(report: Report) -> None:
    """All are counted, the first few are listed, so that a report stays small."""
    found = report([pair("a", "b")] * 40)

    assert (found.num_duplicates, found.duplicate_lines) == (39, [*range(2, 2 + MAX_LINES)])


def test_duplicates_are_told_by_their_labels_too(report: Report) -> None:
    """The same tokens learnt in another place are another sample; the same sample on another line is not."""
    found = report([pair("a", "bc"), pair("ab", "c"), pair("a", "bc")])

    assert (found.num_duplicates, found.duplicate_lines) == (1, [3])


def test_a_cut_that_costs_no_label_is_no_truncation(
    tiny_tokenizer: PreTrainedTokenizerFast, write_lines: Lines
) -> None:
    """A template's line break behind the last label may fall off unnoticed; one token more may not."""
    path = write_lines([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])
    length = len(tokeniser(tiny_tokenizer).mark(next(read_samples(path)))[0])

    exact = tokeniser(tiny_tokenizer, max_seq_len=length - 1).read(path).report
    assert (exact.num_truncated, exact.longest) == (0, length - 1)
    assert tokeniser(tiny_tokenizer, max_seq_len=length - 2).read(path).report.num_truncated == 1


def test_long_samples_are_in_the_last_bucket() -> None:
    """The histogram goes by what a sample needs, not by what is left of it."""
    facts = SampleFacts()
    for length in (16, 17, 8192, 8193):
        facts.add(1, [length], [True], length=length, is_used=True)
    histogram = report_on(facts, [0, 1, 2, 3, 4], 4, longest=8, example=None).histogram

    assert {b.max_tokens: b.num_samples for b in histogram if b.num_samples} == {16: 1, 32: 1, 8192: 1, None: 1}


def test_example_shows_what_is_learnt(report: Report) -> None:
    """A sample's text in runs: the template's and the user's words are no labels, replies with their ends are."""
    talk = [("user", "Hi"), ("assistant", "Hello"), ("user", "é<s>"), ("assistant", "Ciao 🙂")]
    example = report([{"messages": [{"role": r, "content": c} for r, c in talk]}]).example

    assert example is not None
    assert example.runs == [
        Run("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
        Run("Hello<|im_end|>", True),
        Run("\n<|im_start|>user\né<s><|im_end|>\n<|im_start|>assistant\n", False),
        Run("Ciao 🙂<|im_end|>", True),
    ]
    assert (example.line, example.is_whole) == (1, True)


def test_example_is_a_whole_sample_if_there_is_one(report: Report) -> None:
    """A truncated or dropped sample is shown only if there is no better one."""
    objects = [pair("x" * 20, "y"), pair("a", "b" * 20), pair("c", "d")]

    whole, cut = report(objects, max_seq_len=8).example, report(objects[:2], max_seq_len=8).example
    assert whole is not None
    assert whole.line == 3
    assert cut is not None
    assert cut.line == 2


def test_example_is_bounded(report: Report) -> None:
    """However long and however many the turns, the example is short, and says that it is not whole."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}] * 9
    many = report([{"messages": turns}], max_seq_len=4000).example
    long = report([pair("start " + "p" * 80 + " end", "c" * 150)]).example
    longer = report([pair("", "start " + "c" * 3000 + " end")], max_seq_len=4000).example

    assert many is not None
    assert long is not None
    assert longer is not None
    assert (len(many.runs), many.is_whole) == (MAX_RUNS, False)
    assert long.is_whole
    # 256 tokens is all that the base takes, and one token here is one character.
    assert longer.is_whole
    assert max(len(run.text) for run in longer.runs) < MAX_RUN_CHARS


def test_long_runs_lose_their_middle(tiny_tokenizer: PreTrainedTokenizerFast, write_lines: Lines) -> None:
    """A run beyond the bound keeps its beginning and its end."""
    wide = Tokeniser(tiny_tokenizer, frozenset({tiny_tokenizer.eos_token_id}), spec_of(max_seq_len=8000), longest=8000)
    example = wide.read(write_lines([pair("", "start " + "c" * 3000 + " end")])).report.example

    assert example is not None
    assert not example.is_whole
    text = example.runs[1].text
    assert text.startswith("tart cc")
    assert text.endswith("cc end<|im_end|>")
    assert len(text) < MAX_RUN_CHARS + 10


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=st.text(max_size=12), completion=st.text(min_size=1, max_size=12))
def test_example_is_the_sample(
    prompt: str, completion: str, tiny_tokenizer: PreTrainedTokenizerFast, write_lines: Lines
) -> None:
    """The runs put together are the sample's text, also where a character's tokens fall into two runs."""
    data = tokeniser(tiny_tokenizer).read(write_lines([pair(prompt, completion)]))
    assert data.report.example is not None

    assert "".join(run.text for run in data.report.example.runs) == tiny_tokenizer.decode(data[0][0])


def test_report_is_json(report: Report) -> None:
    """The report travels in events and answers as it is."""
    told = report([pair("a", "b")]).to_json()

    assert json.loads(json.dumps(told)) == told
    assert told["histogram"][0] == {"max_tokens": 16, "num_samples": 1}
    assert told["example"]["runs"] == [{"text": "a", "is_label": False}, {"text": "b<|im_end|>", "is_label": True}]
