"""One line's JSON object as a sample: what each format holds, found by its keys."""

import json
from collections.abc import Callable
from typing import Any, Final

from shared.data_format.fields import Fields, printable
from shared.data_format.samples import Conversation, Pair, Sample, Text, Turn
from shared.specs import Message

Object = dict[str, Any]


def parse(text: str, fields: Fields) -> Sample | None:
    """The sample of a line; None if something is wrong, all of which `fields` then holds."""
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        fields.refuse("", "invalid_json", f"not JSON: {error.msg} at column {error.colno}")
        return None
    except ValueError as error:
        fields.refuse("", "invalid_json", f"not JSON: {error}")
        return None
    except RecursionError:
        fields.refuse("", "invalid_json", "nested too deep")
        return None
    if not isinstance(value, dict):
        fields.refuse("", "not_an_object", "a line must be a JSON object")
        return None
    for keys, read in _READERS:
        if any(key in value for key in keys):
            sample = read(value, fields)
            return None if fields.problems else sample
    fields.refuse("", "unknown_format", _advise(value))
    return None


def _advise(value: Object) -> str:
    """What to do about an object that is of no format."""
    if "question" in value and "answer" in value:
        # Not guessed: as a chat, or as raw text joined by this or that, they are different lessons.
        return "write 'question' and 'answer' as 'instruction' and 'output' for a chat, or as 'prompt' and 'completion'"
    keys = ", ".join(f"'{printable(k)}'" for k in list(value)[:10]) or "none"
    return (
        "keys must be 'messages'; 'conversations'; 'instruction' and 'output'; 'prompt' and 'completion'; or 'text'; "
        f"there are {keys}"
    )


# -- messages and sharegpt

_ROLES: Final = {role: role for role in ("system", "user", "assistant")}
_SENDERS: Final = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def _read_messages(value: Object, fields: Fields) -> Sample | None:
    fields.check_keys(value, ["messages"])
    turns = _read_turns(value["messages"], fields, "messages", role_key="role", text_key="content", roles=_ROLES)
    return Conversation(fields.line, turns)


def _read_sharegpt(value: Object, fields: Fields) -> Sample | None:
    fields.check_keys(value, ["conversations", "system"])
    key = "conversations"
    turns = _read_turns(value[key], fields, key, role_key="from", text_key="value", roles=_SENDERS)
    system = fields.text("system", value.get("system"), may_be_empty=True, may_be_missing=True)
    if system and any(turn.message.role == "system" for turn in turns):
        fields.refuse("system", "two_systems", "there is a system turn among the conversations already")
    return Conversation(fields.line, (*_system(system), *turns), kind="sharegpt")


def _read_turns(
    value: object, fields: Fields, path: str, *, role_key: str, text_key: str, roles: dict[str, str]
) -> tuple[Turn, ...]:
    """The turns of a list that has at least one reply to learn; whatever else is there is refused."""
    if not isinstance(value, list) or not value:
        fields.refuse(path, "wrong_type", "must be a list of at least one message")
        return ()
    num_before = len(fields.problems)
    turns = [
        _read_turn(item, fields, f"{path}[{i}]", role_key=role_key, text_key=text_key, roles=roles)
        for i, item in enumerate(value)
    ]
    if len(fields.problems) == num_before and not any(
        t and t.is_learnt and t.message.role == "assistant" for t in turns
    ):
        fields.refuse(path, "nothing_to_learn", "there is no assistant message to learn")
    return tuple(turn for turn in turns if turn is not None)


def _read_turn(
    value: object, fields: Fields, path: str, *, role_key: str, text_key: str, roles: dict[str, str]
) -> Turn | None:
    if not isinstance(value, dict):
        fields.refuse(path, "wrong_type", f"must be an object with {role_key} and {text_key}")
        return None
    num_before = len(fields.problems)
    fields.check_keys(value, [role_key, text_key, "weight"], path=path)
    given, weight = value.get(role_key), value.get("weight", 1)
    role = roles.get(given) if isinstance(given, str) else None
    if role is None:
        shown = f"'{printable(given)}'" if isinstance(given, str) else type(given).__name__
        *most, last = roles
        fields.refuse(f"{path}.{role_key}", "unknown_role", f"must be {', '.join(most)} or {last}, not {shown}")
    if isinstance(weight, bool) or weight not in (0, 1):
        fields.refuse(f"{path}.weight", "invalid_weight", "must be 0 or 1")
    elif "weight" in value and role != "assistant":
        fields.refuse(f"{path}.weight", "invalid_weight", "only assistant messages have a weight")
    content = fields.text(f"{path}.{text_key}", value.get(text_key), may_be_empty=role != "assistant")
    if len(fields.problems) > num_before:
        return None
    return Turn(Message.model_validate({"role": role, "content": content}), is_learnt=weight == 1)


# -- alpaca


def _read_alpaca(value: Object, fields: Fields) -> Sample | None:
    # `text` is the whole sample once more in the data set that gave the format its name.
    known = ["instruction", "input", "output", "system", "history"]
    fields.check_keys(value, known, also_ignored=frozenset({"text"}))
    given = fields.text("input", value.get("input"), may_be_empty=True, may_be_missing=True)
    instruction = fields.text("instruction", value.get("instruction"), may_be_empty=bool(given))
    output = fields.text("output", value.get("output"))
    system = fields.text("system", value.get("system"), may_be_empty=True, may_be_missing=True)
    history = _read_history(value.get("history"), fields)
    asked = "\n".join(part for part in (instruction, given) if part)
    exchanges = [turn for question, reply in [*history, (asked, output)] for turn in _exchange(question, reply)]
    return Conversation(
        fields.line,
        (*_system(system), *exchanges),
        kind="alpaca",
        without_template=Pair(fields.line, alpaca_prompt(instruction, given, system=system, history=history), output),
    )


def alpaca_prompt(
    instruction: str, given: str, *, system: str = "", history: list[tuple[str, str]] | None = None
) -> str:
    """The prompt of an alpaca line for a base model without a chat template: headed blocks, the last one open.

    Only what is given gets a block. The published format's opening sentence is a `system` here: a data set that wants
    it says it.
    """
    blocks = [system] if system else []
    for question, reply in history or []:
        blocks += [f"### Instruction:\n{question}", f"### Response:\n{reply}"]
    if instruction:
        blocks.append(f"### Instruction:\n{instruction}")
    if given:
        blocks.append(f"### Input:\n{given}")
    return "\n\n".join([*blocks, "### Response:\n"])


def _read_history(value: object, fields: Fields) -> list[tuple[str, str]]:
    if value is None:
        return []
    if not isinstance(value, list):
        fields.refuse("history", "wrong_type", f"must be a list of [instruction, output], not {type(value).__name__}")
        return []
    exchanges: list[tuple[str, str]] = []
    for i, item in enumerate(value):
        if isinstance(item, list) and len(item) == 2:
            question = fields.text(f"history[{i}][0]", item[0], may_be_empty=True)
            exchanges.append((question, fields.text(f"history[{i}][1]", item[1])))
        else:
            fields.refuse(f"history[{i}]", "wrong_type", "must be a list of an instruction and its output")
    return exchanges


def _exchange(question: str, reply: str) -> tuple[Turn, Turn]:
    return (
        Turn(Message(role="user", content=question), is_learnt=True),
        Turn(Message(role="assistant", content=reply), is_learnt=True),
    )


def _system(content: str) -> list[Turn]:
    return [Turn(Message(role="system", content=content), is_learnt=True)] if content else []


# -- raw text


def _read_pair(value: Object, fields: Fields) -> Sample | None:
    fields.check_keys(value, ["prompt", "completion"])
    prompt = fields.text("prompt", value.get("prompt"), may_be_empty=True)
    return Pair(fields.line, prompt, fields.text("completion", value.get("completion")))


def _read_text(value: Object, fields: Fields) -> Sample | None:
    fields.check_keys(value, ["text"])
    return Text(fields.line, fields.text("text", value["text"]))


_READERS: Final[list[tuple[tuple[str, ...], Callable[[Object, Fields], Sample | None]]]] = [
    (("messages",), _read_messages),
    (("conversations",), _read_sharegpt),
    (("instruction", "output"), _read_alpaca),
    (("prompt", "completion"), _read_pair),
    (("text",), _read_text),
]


# -- JSON


def _unique(pairs: list[tuple[str, Any]]) -> Object:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key '{printable(key)}' is there twice")
            seen.add(key)
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")
