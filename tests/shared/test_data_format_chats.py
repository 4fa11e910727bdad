"""Sharegpt and alpaca lines: which turns they are, what their raw form is, and how their mistakes are named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.data_format import Conversation, Pair, check_file, read_samples

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(*objects) -> a JSON Lines file of them."""

    def lines(*objects: Any) -> Path:
        path = tmp_path / "data.jsonl"
        path.write_text("\n".join(json.dumps(o) for o in objects), encoding="utf-8")
        return path

    return lines


def read(path: Path) -> Conversation:
    """The one conversation of a file."""
    (sample,) = read_samples(path)
    assert isinstance(sample, Conversation)
    return sample


def turns(sample: Conversation) -> list[tuple[str, str, bool]]:
    return [(t.message.role, t.message.content, t.is_learnt) for t in sample.turns]


def test_sharegpt(write: Write) -> None:
    """Senders become roles under both of their usual names, and a weight of 0 keeps a reply from being learnt."""
    talk = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "a"},
        {"from": "gpt", "value": "b", "weight": 0},
        {"from": "user", "value": "c"},
        {"from": "assistant", "value": "d"},
    ]
    path = write({"conversations": talk})

    assert turns(read(path)) == [
        ("system", "s", True), ("user", "a", True), ("assistant", "b", False), ("user", "c", True),
        ("assistant", "d", True),
    ]  # fmt: skip
    assert read(path).without_template is None
    assert check_file(path).format == "sharegpt"


@pytest.mark.parametrize(("system", "first"), [("s", ("system", "s", True)), ("", ("user", "a", True))])
def test_system_of_sharegpt(system: str, first: tuple[str, str, bool], write: Write) -> None:
    """A top-level system text opens the conversation; an empty one is none."""
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]

    assert turns(read(write({"conversations": talk, "system": system})))[0] == first


def test_sharegpt_is_the_same_conversation_as_messages(write: Write) -> None:
    """The two ways to write a conversation give the same turns."""
    sharegpt = read(write({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}))
    messages = read(write({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}))

    assert sharegpt.turns == messages.turns


def test_alpaca(write: Write) -> None:
    """Instruction and input are one question, the output its reply; the raw form heads each of them."""
    path = write({"instruction": "Add.", "input": "1, 2", "output": "3"})

    assert turns(read(path)) == [("user", "Add.\n1, 2", True), ("assistant", "3", True)]
    assert read(path).without_template == Pair(1, "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n", "3")
    assert check_file(path).format == "alpaca"


@pytest.mark.parametrize("more", [{}, {"input": ""}, {"input": None}, {"system": "", "history": []}, {"history": None}])
def test_alpaca_without_input(more: dict[str, Any], write: Write) -> None:
    """What is absent, null or empty leaves no trace."""
    sample = read(write({"instruction": "Hi", "output": "Yo", **more}))

    assert turns(sample) == [("user", "Hi", True), ("assistant", "Yo", True)]
    assert sample.without_template == Pair(1, "### Instruction:\nHi\n\n### Response:\n", "Yo")


def test_alpaca_with_system_and_history(write: Write) -> None:
    """Earlier exchanges come first, after the system text, as turns and in the raw form alike."""
    sample = read(write({"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]}))

    assert turns(sample) == [
        ("system", "s", True), ("user", "a", True), ("assistant", "b", True), ("user", "c", True),
        ("assistant", "d", True),
    ]  # fmt: skip
    assert sample.without_template == Pair(
        1, "s\n\n### Instruction:\na\n\n### Response:\nb\n\n### Instruction:\nc\n\n### Response:\n", "d"
    )


def test_alpaca_with_its_text(write: Write) -> None:
    """The column that holds the whole sample once more, as in the data set that named the format, is skipped."""
    report = check_file(write({"instruction": "a", "output": "b", "text": "### Instruction: a ### Response: b"}))

    assert (report.is_valid, report.format, report.ignored_keys) == (True, "alpaca", ["text"])


def talk(*items: Any, **more: Any) -> dict[str, Any]:
    return {"conversations": [*items], **more}


REPLY = {"from": "gpt", "value": "x"}
BAD_LINES: dict[str, tuple[dict[str, Any], str, str]] = {
    "no turns": (talk(), "conversations", "wrong_type"),
    "text": ({"conversations": "x"}, "conversations", "wrong_type"),
    "turn is text": (talk("x"), "conversations[0]", "wrong_type"),
    "tool": (talk(REPLY, {"from": "tool", "value": "x"}), "conversations[1].from", "unknown_role"),
    "no value": (talk(REPLY, {"from": "human"}), "conversations[1].value", "missing"),
    "empty reply": (talk({"from": "gpt", "value": ""}), "conversations[0].value", "empty"),
    "value is a number": (talk({"from": "gpt", "value": 5}), "conversations[0].value", "wrong_type"),
    "more in a turn": (talk({**REPLY, "markdown": None}), "conversations[0].markdown", "unknown_key"),
    "no reply": (talk({"from": "human", "value": "x"}), "conversations", "nothing_to_learn"),
    "tools": (talk(REPLY, tools="[]"), "tools", "unknown_key"),
    "two systems": (talk({"from": "system", "value": "a"}, REPLY, system="b"), "system", "two_systems"),
    "system is a list": (talk(REPLY, system=["b"]), "system", "wrong_type"),
    "no output": ({"instruction": "x"}, "output", "missing"),
    "empty output": ({"instruction": "x", "output": ""}, "output", "empty"),
    "no instruction": ({"output": "x"}, "instruction", "missing"),
    "empty instruction": ({"instruction": "", "output": "x"}, "instruction", "empty"),
    "input is a number": ({"instruction": "x", "input": 1, "output": "x"}, "input", "wrong_type"),
    "misspelt": ({"instruction": "x", "inptu": "1", "output": "x"}, "inptu", "unknown_key"),
    "chosen": ({"instruction": "x", "output": "x", "rejected": "y"}, "rejected", "unknown_key"),
    "history is text": ({"instruction": "x", "output": "x", "history": "y"}, "history", "wrong_type"),
    "history of texts": ({"instruction": "x", "output": "x", "history": ["y"]}, "history[0]", "wrong_type"),
    "history of three": ({"instruction": "x", "output": "x", "history": [["a", "b", "c"]]}, "history[0]", "wrong_type"),
    "empty in history": ({"instruction": "x", "output": "x", "history": [["a", ""]]}, "history[0][1]", "empty"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line_is_named(name: str, write: Write) -> None:
    """Each mistake is reported with its line, its place in the line and a stable code, and the rest is read."""
    line, path, code = BAD_LINES[name]
    good = talk(REPLY) if "conversations" in line else {"instruction": "x", "output": "y"}
    report = check_file(write(good, line, good))

    assert [(p.line, p.path, p.code) for p in report.problems] == [(2, path, code)]
    assert report.num_samples == 2


def test_unknown_keys_are_told_what_is_skipped(write: Write) -> None:
    """The message tells the keys of the format and that bookkeeping may stay, so that nobody strips whole files."""
    problem = check_file(write({"instruction": "x", "output": "y", "reward": 1})).problems[0]

    allowed = "instruction, input, output, system and history"
    assert problem.message == f"unknown key; allowed are {allowed}; keys such as id and source are skipped"


def test_alpaca_and_sharegpt_do_not_mix(write: Write) -> None:
    """They are formats of their own, though both become conversations."""
    report = check_file(write(talk(REPLY), {"instruction": "x", "output": "y"}))

    assert [(p.line, p.code) for p in report.problems] == [(2, "mixed_formats")]
