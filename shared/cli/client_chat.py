"""Talk to a base model, an adapter or a mix: one question, or one after another, with answers streamed as they come."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import click

from shared.cli.client_output import Output
from shared.cli.http import Json, Service, ServiceError

_OPTIONAL = ("top_p", "min_p", "repetition_penalty", "max_tokens", "seed", "stop")


class _Share(click.ParamType[tuple[str, float]]):
    """NAME[@VERSION]=WEIGHT as a pair; the weight is 1 where none is given."""

    name = "NAME[@VERSION][=WEIGHT]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        model, equals, text = str(value).partition("=")
        try:
            weight = float(text) if equals else 1.0
        except ValueError:
            weight = math.nan
        if not model or not math.isfinite(weight):
            self.fail(f"{value!r} is not NAME=WEIGHT", param, ctx)
        return model, weight


_OPTIONS = (
    click.option("--system", help="A system message before the first question."),
    click.option("--mix", type=_Share(), multiple=True,
                 help="One adapter of a mix; give two or more, and their base model as the name."),
    click.option("--temperature", type=float, default=0.0, show_default=True,
                 help="0 takes the likeliest token each time."),
    click.option("--top-p", type=float, help="Sample from the likeliest tokens that have this probability together."),
    click.option("--min-p", type=float, help="Drop tokens less likely than this share of the likeliest."),
    click.option("--repetition-penalty", type=float, help="Above 1: what was said before comes again less."),
    click.option("--max-tokens", type=int, help="The longest answer, in tokens."),
    click.option("--stop", multiple=True, help="End the answer before this text; up to four times."),
    click.option("--seed", type=int, help="Makes a sampled answer repeatable."),
)  # fmt: skip


def chat_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command an option for each field of a Question but its model."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is sent with every turn; None leaves the choice to the service."""

    model: str
    mix: tuple[tuple[str, float], ...]
    temperature: float
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    max_tokens: int | None
    seed: int | None
    stop: tuple[str, ...]
    system: str | None

    def first_messages(self) -> list[Json]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def body(self, messages: list[Json]) -> Json:
        optional: Json = {name: getattr(self, name) for name in _OPTIONAL}
        optional["lora_mix"] = [{"model": model, "weight": weight} for model, weight in self.mix] or None
        asked = {name: value for name, value in optional.items() if value not in (None, ())}
        return {"model": self.model, "messages": messages, "temperature": self.temperature, "stream": True} | asked


@dataclass
class Answer:
    """What came back. `model` is who really answered, `finish_reason` None when the answer was cut short."""

    model: str
    content: str = ""
    finish_reason: str | None = None
    system_fingerprint: str | None = None

    def to_json(self) -> Json:
        return dict(vars(self))


def ask(service: Service, question: Question, messages: list[Json], show: Callable[[str], Any]) -> Answer:
    """The answer to `messages`; each piece is shown when it comes. Ctrl-C ends it early and keeps what came."""
    answer = Answer(question.model)
    with closing(service.stream("/chat/completions", question.body(messages))) as events:
        try:
            for event in events:
                answer.model = event["model"]
                answer.system_fingerprint = event.get("system_fingerprint") or answer.system_fingerprint
                for choice in event["choices"]:
                    piece = choice["delta"].get("content") or ""
                    answer.content += piece
                    answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
                    show(piece)
        except KeyboardInterrupt:
            if not answer.content:
                raise
    return answer


def ask_once(service: Service, out: Output, question: Question, prompt: str) -> Answer:
    answer = ask(service, question, [*question.first_messages(), _user(prompt)], _shown(out))
    _finish(out, answer)
    return answer


def converse(service: Service, out: Output, question: Question) -> None:
    """Turn after turn until end of input; the model sees the whole conversation.

    A failed turn is reported and forgotten; only what no other turn could mend ends the conversation.
    """
    messages = question.first_messages()
    for prompt in _prompts(interactive=sys.stdin.isatty() and not out.as_json):
        try:
            answer = ask(service, question, [*messages, _user(prompt)], _shown(out))
        except ServiceError as error:
            if error.status in (401, 403, 404):
                raise
            out.fail(error)
            continue
        _finish(out, answer)
        messages += [_user(prompt), {"role": "assistant", "content": answer.content}]


def _prompts(*, interactive: bool) -> Iterator[str]:
    """Lines that say something, from the terminal or a pipe, until the input ends."""
    while True:
        try:
            line = input("> ") if interactive else sys.stdin.readline()
        except EOFError:
            line = ""
            interactive = False
            print()
        if line.strip():
            yield line.strip()
        elif not line and not interactive:
            return


def _user(prompt: str) -> Json:
    return {"role": "user", "content": prompt}


def _shown(out: Output) -> Callable[[str], object]:
    return (lambda piece: None) if out.as_json else out.piece


def _finish(out: Output, answer: Answer) -> None:
    if out.as_json:
        out.json_line(answer.to_json())
    else:
        out.piece("\n")
