"""What a line of training data may hold, and how each thing that is wrong with it is named."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared import data_format, limits
from shared.data_format import Conversation, Pair, Text, Turn, check_file, read_samples
from shared.errors import InvalidTrainingFile
from shared.specs import Message

File = Callable[[bytes], Path]
PAIR = b'{"prompt": "p", "completion": "c"}'


@pytest.fixture
def file(tmp_path: Path) -> File:
    """file(content) -> the path of a file that holds it."""

    def write(content: bytes) -> Path:
        path = tmp_path / "data.jsonl"
        path.write_bytes(content)
        return path

    return write


def message(role: str, content: str) -> Message:
    return Message.model_validate({"role": role, "content": content})


def test_conversation(file: File) -> None:
    """A chat line becomes turns; a weight of 0 says that a reply is not to be learnt."""
    line = {
        "messages": [
            {"role": "system", "content": ""},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "A", "weight": 0},
            {"role": "assistant", "content": "B", "weight": 1},
        ]
    }
    turns = (
        Turn(message("system", ""), True),
        Turn(message("user", "Hi"), True),
        Turn(message("assistant", "A"), False),
        Turn(message("assistant", "B"), True),
    )

    assert [*read_samples(file(json.dumps(line).encode()))] == [Conversation(1, turns)]


def test_pair_and_text(file: File) -> None:
    """The other two formats; a prompt may be empty."""
    assert [*read_samples(file(b'{"prompt": "", "completion": "c"}'))] == [Pair(1, "", "c")]
    assert [*read_samples(file(b'{"text": "t"}'))] == [Text(1, "t")]


@pytest.mark.parametrize(
    "content",
    [
        PAIR + b"\n" + PAIR,
        PAIR + b"\r\n" + PAIR + b"\r\n",
        b"\xef\xbb\xbf" + PAIR + b"\n" + PAIR + b"\n\n",
        PAIR + b"\n" + b"  \t " + b"\n" + PAIR,
    ],
    ids=["no final line end", "CRLF", "byte order mark", "blank line"],
)
def test_line_ends(content: bytes, file: File) -> None:
    """Any usual way to write lines is read, and the report counts the samples."""
    report = check_file(file(content))

    assert (report.format, report.num_samples, report.is_valid) == ("prompt_completion", 2, True)


def test_line_numbers_are_the_files(file: File) -> None:
    """Blank lines count, so that an editor shows the line that is meant."""
    assert [s.line for s in read_samples(file(PAIR + b"\n\n\n" + PAIR))] == [1, 4]


CHAT = '{{"messages": [{}]}}'
BAD_LINES = {
    "not JSON": ("{'prompt': 1}", "", "invalid_json"),
    "cut": ('{"prompt": "p", "compl', "", "invalid_json"),
    "two values": ('{"text": "a"} {"text": "b"}', "", "invalid_json"),
    "NaN": ('{"text": NaN}', "", "invalid_json"),
    "duplicate key": ('{"text": "a", "text": "b"}', "", "invalid_json"),
    "deep": ("[" * 200_000, "", "invalid_json"),
    "long number": ('{"text": ' + "9" * 5000 + "}", "", "invalid_json"),
    "list": ('["a"]', "", "not_an_object"),
    "other keys": ('{"query": "q", "response": "a"}', "", "unknown_format"),
    "empty object": ("{}", "", "unknown_format"),
    "no completion": ('{"prompt": "p"}', "completion", "missing"),
    "no prompt": ('{"completion": "c"}', "prompt", "missing"),
    "empty completion": ('{"prompt": "p", "completion": ""}', "completion", "empty"),
    "number": ('{"text": 5}', "text", "wrong_type"),
    "null": ('{"text": null}', "text", "missing"),
    "half a surrogate": ('{"text": "\\ud800"}', "text", "invalid_unicode"),
    "more keys": ('{"text": "t", "labels": 5}', "labels", "unknown_key"),
    "unprintable key": ('{"text": "t", "a\\u0000\\ud800": 5}', "a??", "unknown_key"),
    "both formats": ('{"text": "t", "prompt": "p", "completion": "c"}', "text", "unknown_key"),
    "messages is text": ('{"messages": "hi"}', "messages", "wrong_type"),
    "no messages": ('{"messages": []}', "messages", "wrong_type"),
    "message is text": (CHAT.format('"hi"'), "messages[0]", "wrong_type"),
    "role": (CHAT.format('{"role": "tool", "content": "x"}'), "messages[0].role", "unknown_role"),
    "role is a list": (CHAT.format('{"role": [], "content": "x"}'), "messages[0].role", "unknown_role"),
    "content is null": (CHAT.format('{"role": "user", "content": null}'), "messages[0].content", "missing"),
    "content is parts": (CHAT.format('{"role": "user", "content": [1]}'), "messages[0].content", "wrong_type"),
    "empty reply": (CHAT.format('{"role": "assistant", "content": ""}'), "messages[0].content", "empty"),
    "name": (CHAT.format('{"role": "user", "content": "x", "name": "n"}'), "messages[0].name", "unknown_key"),
    "weight": (
        CHAT.format('{"role": "assistant", "content": "x", "weight": 0.5}'), "messages[0].weight", "invalid_weight",
    ),
    "weight of a question": (
        CHAT.format('{"role": "user", "content": "x", "weight": 1}'), "messages[0].weight", "invalid_weight",
    ),
    "no reply": (CHAT.format('{"role": "user", "content": "x"}'), "messages", "nothing_to_learn"),
    "no learnt reply": (
        CHAT.format('{"role": "assistant", "content": "x", "weight": 0}'), "messages", "nothing_to_learn",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line_is_named(name: str, file: File) -> None:
    """Each mistake is reported with its line, its place in the line and a stable code."""
    line, path, code = BAD_LINES[name]
    good = b'{"messages": [{"role": "assistant", "content": "x"}]}' if "messages" in line else b'{"text": "t"}'
    report = check_file(file(good + b"\n" + line.encode() + b"\n" + good))

    assert [(p.line, p.path, p.code) for p in report.problems] == [(2, path, code)]
    assert (report.num_samples, report.num_problems) == (2, 1)


def test_all_problems_of_a_line(file: File) -> None:
    """Several mistakes in one line are reported together."""
    report = check_file(file(b'{"prompt": 1, "completion": "", "labels": 2}'))

    assert {p.path for p in report.problems} == {"prompt", "completion", "labels"}


@pytest.mark.parametrize("line", ['{"text": "t", %s}', '{"messages": [{"role": "assistant", "content": "x"}], %s}'])
def test_bookkeeping_is_skipped_and_named(line: str, file: File) -> None:
    """Keys that only keep books change no sample, whatever their values, and the report says which there are."""
    more, bare = line % '"id": [{"x": 1}], "source": null', line.replace(", %s", "")
    report = check_file(file(f"{more}\n{bare}".encode()))

    assert (report.is_valid, report.ignored_keys) == (True, ["id", "source"])
    first, second = read_samples(file(f"{more}\n{bare}".encode()))
    assert replace(first, line=2) == second


def test_bookkeeping_inside_a_message_is_refused(file: File) -> None:
    """Only the line itself may keep books; inside a message each key says how it is to be read."""
    report = check_file(file(b'{"messages": [{"role": "assistant", "content": "x", "id": 1}]}'))

    assert [(p.path, p.code) for p in report.problems] == [("messages[0].id", "unknown_key")]


def test_questions_and_answers_are_told_what_to_be(file: File) -> None:
    """The two keys of many public data sets are not guessed at; the error says what they can be called here."""
    problem = check_file(file(b'{"question": "q", "answer": "a"}')).problems[0]

    assert problem.code == "unknown_format"
    assert "'instruction' and 'output' for a chat, or as 'prompt' and 'completion'" in problem.message


def test_duplicate_key_inside_a_message(file: File) -> None:
    """A key given twice deep inside is seen, and named."""
    line = b'{"messages": [{"role": "user", "role": "assistant", "content": "x"}]}'

    assert "the key 'role' is there twice" in check_file(file(line)).problems[0].message


def test_one_file_has_one_format(file: File) -> None:
    """Lines of another format than the first are problems, not samples."""
    report = check_file(file(PAIR + b'\n{"text": "t"}\n' + PAIR))

    assert (report.format, report.num_samples) == ("prompt_completion", 2)
    assert [(p.line, p.code) for p in report.problems] == [(2, "mixed_formats")]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "empty_file"),
        (b"\n \n", "empty_file"),
        (b"PK\x03\x04", "unsupported_file"),
        (b'[{"text": "a"},', "json_array"),
        (b'[\n  {"text": "a"}\n]', "json_array"),
        (b"\xff\xfe{", "invalid_utf8"),
    ],
)
def test_bad_file(content: bytes, code: str, file: File) -> None:
    """A file that holds no lines of text is one problem."""
    report = check_file(file(content))

    assert report.problems[0].code == code
    assert (report.format, report.num_samples) == (None, 0)


def test_reading_names_the_first_problem(file: File) -> None:
    """Reading gives the samples before the first bad line and then raises with its number and place."""
    samples = read_samples(file(PAIR + b'\n{"prompt": "p"}\n' + PAIR))

    assert next(samples) == Pair(1, "p", "c")
    with pytest.raises(InvalidTrainingFile, match=r"^line 2: completion: must be given$") as failure:
        next(samples)
    assert failure.value.param == "training_file"


def test_line_length_limit(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line may be as long as the limit and no longer; the lines after a longer one are still read."""
    monkeypatch.setattr(limits, "DATASET_LINE_BYTES", len(PAIR))
    longer = PAIR.replace(b"c", b"c" * 300, 1)
    report = check_file(file(PAIR + b"\r\n" + longer + b"\n" + PAIR))

    assert report.num_samples == 2
    assert [(p.line, p.code) for p in report.problems] == [(2, "line_too_long")]


@pytest.mark.parametrize(
    ("limit", "value", "code"),
    [("DATASET_LINES", 2, "too_many_lines"), ("DATASET_BYTES", 2 * len(PAIR) + 2, "file_too_large")],
)
def test_file_limits(limit: str, value: int, code: str, file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two lines fit into the limit, the third is a problem and ends the reading."""
    monkeypatch.setattr(limits, limit, value)

    assert check_file(file((PAIR + b"\n") * 2)).is_valid
    report = check_file(file((PAIR + b"\n") * 9))
    assert [(p.line, p.code) for p in report.problems] == [(3, code)]


def test_many_problems_are_counted_not_listed(file: File) -> None:
    """The report stays small however bad the file is, and says how bad it is."""
    report = check_file(file(b"x\n" * 200))

    assert (len(report.problems), report.num_problems) == (data_format.MAX_PROBLEMS, 200)


def test_report_is_json(file: File) -> None:
    """A report survives JSON, whatever was in the file."""
    report = check_file(file(PAIR + b'\n{"prompt": "p", "completion": "c", "\\ud800\\u0000": 1}'))
    told = report.to_json()

    assert json.loads(json.dumps(told)) == told
    assert told["problems"][0] == {
        "line": 2, "path": "??", "code": "unknown_key",
        "message": "unknown key; allowed are prompt and completion; keys such as id and source are skipped",
    }  # fmt: skip


@settings(
    max_examples=250, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(["user", "assistant", "system"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        *("messages", "role", "content", "weight", "prompt", "completion", "text", "conversations"),
                        *("from", "value", "instruction", "input", "output", "system", "history", "id", "x"),
                    ]
                ),
                inner,
            )
        ),
    ).map(lambda value: json.dumps(value).encode())
)
def test_no_content_raises(file: File, content: bytes) -> None:
    """Any bytes give a report: samples that reading gives too, or problems that say why not."""
    path = file(content)
    report = check_file(path)

    assert report.is_valid == (report.num_problems == 0)
    if report.is_valid:
        assert len([*read_samples(path)]) == report.num_samples > 0
    else:
        assert all(p.code and p.message for p in report.problems)
        with pytest.raises(InvalidTrainingFile):
            list(read_samples(path))
