"""Which tokens of a sample are labels, what is cut and dropped, and in which order an epoch sees the samples."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from shared.data_format import Conversation, Pair, Sample, Text, Turn
from shared.errors import InvalidTrainingFile
from shared.specs import Message
from tests.worker.training.conftest import spec_of
from worker.training.dataset import TokenisedDataset, Tokeniser, epoch_order, pack

Lines = Callable[..., Path]
CHAT = {"messages": [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Ciao"},
]}  # fmt: skip


def tokeniser(tokenizer: PreTrainedTokenizerFast, *, longest: int = 256, **changes: Any) -> Tokeniser:
    return Tokeniser(tokenizer, frozenset({tokenizer.eos_token_id}), spec_of(**changes), longest=longest)


def labels_of(tokenizer: PreTrainedTokenizerFast, ids: list[int], is_label: list[bool]) -> str:
    """The labelled tokens, decoded; a bar wherever unlabelled tokens stand in between or before."""
    runs: list[list[int]] = [[]]
    for token, label in zip(ids, is_label, strict=True):
        if label:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return "|".join(tokenizer.decode(run) for run in runs if run)


def conversation(*turns: tuple[str, str, bool]) -> Conversation:
    return Conversation(
        1, tuple(Turn(Message.model_validate({"role": r, "content": c}), is_learnt) for r, c, is_learnt in turns)
    )


TURNS = [(m["role"], m["content"], True) for m in CHAT["messages"]]


@pytest.mark.parametrize(
    ("sample", "labels"),
    [
        (conversation(*TURNS), "Hello<|im_end|>|Ciao<|im_end|>"),
        (conversation(*TURNS[:-1], (*TURNS[-1][:2], False)), "Hello<|im_end|>"),
        (Pair(1, "2 + 2 =", " 4"), " 4<|im_end|>"),
        (Pair(1, "", "abc"), "bc<|im_end|>"),
        (Text(1, "Once upon"), "nce upon<|im_end|>"),
    ],
    ids=["chat", "chat, last reply not learnt", "pair", "pair without prompt", "text"],
)
def test_labels(sample: Sample, labels: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Replies, completions and texts are labels up to and including the end token; a first token never is."""
    assert labels_of(tiny_tokenizer, *tokeniser(tiny_tokenizer).mark(sample)) == labels


@pytest.mark.parametrize("sample", [conversation(*TURNS), Pair(1, "2 + 2 =", " 4"), Text(1, "Once upon")])
def test_train_on_all(sample: Sample, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """`train_on` "all" labels every token but the first, and changes no token."""
    ids, is_label = tokeniser(tiny_tokenizer, train_on="all").mark(sample)

    assert is_label == [False] + [True] * (len(ids) - 1)
    assert ids == tokeniser(tiny_tokenizer).mark(sample)[0]


def test_end_is_labelled_where_it_is_also_padding(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Labels go by place, not by id: an end token that serves as padding too is learnt all the same."""
    tiny_tokenizer.pad_token = tiny_tokenizer.eos_token
    ids, is_label = tokeniser(tiny_tokenizer).mark(Pair(1, "a", "b"))

    assert (ids[-1], is_label[-1]) == (tiny_tokenizer.pad_token_id, True)


def test_end_that_is_written_is_not_doubled(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """A completion that spells the end token gets no second one."""
    marked = tokeniser(tiny_tokenizer).mark(Pair(1, "a", "b<|im_end|>"))

    assert marked == tokeniser(tiny_tokenizer).mark(Pair(1, "a", "b"))


def test_end_follows_a_reply_that_the_template_does_not_close(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Under a template without end tokens the last reply ends with the tokenizer's own, directly behind its content."""
    tiny_tokenizer.chat_template = (
        "{% for m in messages %}### {{ m.role }}\n{{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant\n{% endif %}"
    )
    ids, is_label = tokeniser(tiny_tokenizer).mark(conversation(*TURNS))

    assert labels_of(tiny_tokenizer, ids, is_label) == "Hello|Ciao<|im_end|>"
    assert tiny_tokenizer.decode(ids).endswith("### assistant\nCiao<|im_end|>")


@pytest.fixture
def read(tiny_tokenizer: PreTrainedTokenizerFast, write_lines: Lines) -> Callable[..., TokenisedDataset]:
    """read(objects, **changes) -> the data set that training would see."""

    def read_lines(objects: list[dict[str, Any]], *, longest: int = 256, **changes: Any) -> TokenisedDataset:
        return tokeniser(tiny_tokenizer, longest=longest, **changes).read(write_lines(objects))

    return read_lines


def test_file_becomes_samples(read: Callable[..., TokenisedDataset], tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """The samples of a file come back one by one as they were marked, in the file's order."""
    objects = [{"prompt": "a", "completion": "bc"}, {"prompt": "dd", "completion": "e"}]
    data = read(objects)
    expected = [tokeniser(tiny_tokenizer).mark(Pair(1, o["prompt"], o["completion"])) for o in objects]

    assert [(t.tolist(), m.tolist()) for t, m in (data[i] for i in range(len(data)))] == expected
    assert [(data.num_tokens(i), data.num_labels(i)) for i in range(2)] == [(4, 3), (4, 2)]


def test_tokens_behind_the_last_label_are_left_out(
    read: Callable[..., TokenisedDataset], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """A template's line break after the last reply costs nothing, since nothing is learnt from it."""
    data = read([CHAT])

    assert tiny_tokenizer.decode(data[0][0]).endswith("Ciao<|im_end|>")


def test_too_long_samples_lose_their_end(read: Callable[..., TokenisedDataset]) -> None:
    """Truncation keeps the first tokens and what labels are among them, and is counted."""
    data = read([{"prompt": "abcde", "completion": "fghijklm"}, {"prompt": "a", "completion": "b"}], max_seq_len=8)

    assert [(data.num_tokens(i), data.num_labels(i)) for i in range(2)] == [(8, 3), (3, 2)]
    assert (data.report.num_truncated, data.report.longest) == (1, 8)


def test_context_of_the_base_truncates_too(read: Callable[..., TokenisedDataset]) -> None:
    """No sample is longer than the base's context, whatever the spec allows."""
    data = read([{"prompt": "abcde", "completion": "fghijklm"}], longest=7, max_seq_len=100)

    assert data.num_tokens(0) == 7


def test_samples_without_labels_are_dropped(read: Callable[..., TokenisedDataset]) -> None:
    """What has no label left after truncation is dropped and counted, not trained on as nothing."""
    data = read([{"prompt": "x" * 20, "completion": "y"}, {"prompt": "a", "completion": "b"}], max_seq_len=8)

    assert len(data) == 1
    assert (data.report.num_samples, data.report.num_used, data.report.num_dropped) == (2, 1, 1)
    assert (data.report.num_tokens, data.report.num_label_tokens) == (3, 2)


def test_nothing_to_learn(read: Callable[..., TokenisedDataset]) -> None:
    """A file of which nothing is left is an error that says so."""
    with pytest.raises(InvalidTrainingFile, match="none of 1 samples has a label in its first 8 tokens"):
        read([{"prompt": "x" * 20, "completion": "y"}], max_seq_len=8)


def test_refused_conversation_names_its_line(
    read: Callable[..., TokenisedDataset], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """What the chat template says about a conversation comes with the line."""
    tiny_tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system please') }}{% endif %}"
        "{{ m.content }}<|im_end|>{% endfor %}"
    )
    good = {"messages": CHAT["messages"][1:]}

    with pytest.raises(InvalidTrainingFile, match=r"line 2: .*no system please"):
        read([good, CHAT])


def test_chat_without_template(read: Callable[..., TokenisedDataset], tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Conversations on a base without a chat template are refused, pairs are not."""
    tiny_tokenizer.chat_template = None

    assert len(read([{"prompt": "a", "completion": "b"}])) == 1
    with pytest.raises(InvalidTrainingFile, match="line 1: this base model has no chat template"):
        read([CHAT])


def test_reading_can_be_ended(tiny_tokenizer: PreTrainedTokenizerFast, write_lines: Lines) -> None:
    """What the caller raises between samples comes out."""

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        tokeniser(tiny_tokenizer).read(write_lines([CHAT]), between_samples=stop)


def test_order_is_a_permutation() -> None:
    """Each epoch sees each sample once, shuffled."""
    order = epoch_order(100, seed=1, epoch=0)

    assert sorted(order) == list(range(100))
    assert order != list(range(100))


def test_order_depends_on_seed_and_epoch_only() -> None:
    """The same seed and epoch give the same order whatever torch's global state; another of either gives another."""
    first = epoch_order(100, seed=1, epoch=2)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        again = epoch_order(100, seed=1, epoch=2)

    assert again == first
    assert epoch_order(100, seed=2, epoch=1) != first
    assert epoch_order(100, seed=1, epoch=3) != first


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([3, 3, 3, 3], [[0, 1, 2], [3]]),
        ([10, 1], [[0], [1]]),
        ([11, 1, 9, 1], [[0], [1, 2], [3]]),
        ([1, 30, 1], [[0], [1], [2]]),
        ([], []),
    ],
)
def test_pack(sizes: list[int], expected: list[list[int]]) -> None:
    """Streams are filled in order up to the limit of 10; a longer sample goes alone."""
    assert pack(range(len(sizes)), sizes.__getitem__, max_tokens=10) == expected
