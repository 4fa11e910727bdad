"""What choices say: seeds, penalties, log-probabilities, echo, over the tiny model."""

from typing import Any

import pytest
import torch

from tests.worker.inference.test_answer import answer_to, ask, generate, ids_of, logits_after, text_of
from worker.base_model import BaseModel
from worker.inference.sampling import Chosen


def test_the_same_seed_gives_the_same_answer(tiny_base: BaseModel) -> None:
    """And another seed another one."""

    def sampled(seed: int) -> str:
        return text_of(generate(tiny_base, ask(temperature=1.0, seed=seed))[1])

    assert sampled(3) == sampled(3)
    assert sampled(3) != sampled(4)


def test_choices_differ_and_each_can_be_had_alone(tiny_base: BaseModel) -> None:
    """Choice i of a request with a seed is the answer to the same request with the seed i above it."""
    _, chunks = generate(tiny_base, ask(temperature=1.0, seed=7, n=3))

    texts = [text_of(chunks, index) for index in range(3)]
    assert len(set(texts)) == 3
    assert texts == [text_of(generate(tiny_base, ask(temperature=1.0, seed=7 + i))[1]) for i in range(3)]


def test_choices_without_a_seed_differ(tiny_base: BaseModel) -> None:
    """Each draws one for itself."""
    _, chunks = generate(tiny_base, ask(temperature=1.0, n=2))

    assert text_of(chunks, 0) != text_of(chunks, 1)


# -- penalties


@pytest.mark.parametrize(
    "penalty", [{"frequency_penalty": 2.0}, {"presence_penalty": 2.0}, {"repetition_penalty": 2.0}]
)
def test_penalties_change_a_repetitive_answer(tiny_base: BaseModel, penalty: dict[str, float]) -> None:
    """Greedy answers of the tiny model repeat tokens; with a penalty they have more different ones."""
    plain, _ = generate(tiny_base, ask(max_tokens=24))
    penalised, _ = generate(tiny_base, ask(max_tokens=24, **penalty))

    assert len(set(penalised.choices[0].token_ids)) > len(set(plain.choices[0].token_ids))


def test_the_repetition_penalty_sees_the_prompt(tiny_base: BaseModel) -> None:
    """The first token is chosen with the prompt's tokens penalised; the other penalties do not touch it."""
    prompt = list(range(3, 259))
    logits = logits_after(tiny_base, prompt[:200])
    seen = torch.zeros(len(logits), dtype=torch.bool)
    seen[prompt[:200]] = True
    expected = torch.where(seen, torch.where(logits > 0, logits / 2, logits * 2), logits).argmax()

    answer, _ = generate(tiny_base, ask(prompt=prompt[:200], max_tokens=1, repetition_penalty=2.0))
    others, _ = generate(tiny_base, ask(prompt=prompt[:200], max_tokens=1, frequency_penalty=2.0, presence_penalty=2.0))

    assert answer.choices[0].token_ids == [int(expected)]
    assert others.choices[0].token_ids == [int(logits.argmax())]
    assert int(expected) != int(logits.argmax())


# -- log-probabilities


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 5, "seed": 1}, {"presence_penalty": 1.0}])
def test_logprobs_are_those_of_a_plain_forward(tiny_base: BaseModel, options: dict[str, Any]) -> None:
    """Of every token, from one forward over the whole sequence, whatever temperature, cuts and penalties chose."""
    answer, chunks = generate(tiny_base, ask(logprobs=3, **options))
    prompt, token_ids = answer.prompt.ids, answer.choices[0].token_ids
    with torch.no_grad():
        logits = tiny_base.model(torch.tensor([[*prompt, *token_ids]])).logits[0, len(prompt) - 1 : -1]
    expected = logits.double().log_softmax(dim=-1)

    told = [token for chunk in chunks for token in chunk.logprobs or []]

    assert [token.logprob for token in told] == pytest.approx(
        [float(row[i]) for row, i in zip(expected, token_ids, strict=True)], abs=1e-5
    )
    for token, row in zip(told, expected, strict=True):
        values, ids = row.topk(3)
        assert [t.logprob for t in token.top] == pytest.approx(values.tolist(), abs=1e-5)
        assert [t.token for t in token.top] == [tiny_base.tokenizer.decode([i]) for i in ids]


def test_logprobs_are_told_once_for_every_token(tiny_base: BaseModel) -> None:
    """Also of tokens whose text is held back or cut off, and of EOS: as many as usage counts."""
    answer = answer_to(tiny_base, ask(stop=["STOP"], logprobs=0))
    ids = ids_of(tiny_base, "a😀STOP")
    for token_id in ids:
        answer.choices[0].take(Chosen(token_id, -1.0))

    told = [token for chunk in answer.stream for token in chunk.logprobs or []]

    assert bytes(byte for token in told for byte in token.bytes).decode() == "a😀STOP"
    assert len(told) == len(ids)


def test_logprobs_come_unasked_to_nobody(tiny_base: BaseModel) -> None:
    """Their field is absent, not empty."""
    _, chunks = generate(tiny_base, ask())

    assert {chunk.logprobs is None for chunk in chunks} == {True}


# -- echo


@pytest.mark.parametrize("prompt", ["<|im_start|>hi", [1, *range(70, 75)]])
def test_echo_tells_the_prompt_first(tiny_base: BaseModel, prompt: str | list[int]) -> None:
    """Special tokens included, before every choice's own text; usage counts what was generated."""
    _, plain = generate(tiny_base, ask(prompt=prompt, n=2))
    _, echoed = generate(tiny_base, ask(prompt=prompt, n=2, echo=True))

    spelled = prompt if isinstance(prompt, str) else tiny_base.tokenizer.decode(prompt)
    assert spelled.startswith("<|im_start|>")
    assert [text_of(echoed, i) for i in range(2)] == [spelled + text_of(plain, i) for i in range(2)]
    assert echoed[-1].usage == plain[-1].usage
