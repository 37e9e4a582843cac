"""Decisions over HTTP, as OpenAI's client asks for them: what is put to the model, and what its answers come to."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Decision

from deployments.calls import Call
from deployments.http.decisions.likelihoods import Answers, TooManyPlaces
from engine.pooling import NextToken
from engine.text.tokenizer import Tokenizer
from tests.serving.fakes import EOS, FakeBackend, Served, serve

TEXT = "I was charged twice for the same subscription." * 3
PREDICATE = {"type": "predicate", "name": "refund", "instructions": "Money goes back."}
CHOICE = {
    "type": "choice",
    "instructions": [{"type": "input_text", "text": "What is it about?"}, {"type": "input_json", "data": {"a": [1]}}],
    "choices": [{"value": "billing"}, {"value": "bills", "description": "papers"}, {"value": True}],
}
SCORE = {
    "type": "score",
    "name": "urgency",
    "instructions": "How urgent is it?",
    "levels": [{"label": "low"}, {"label": "middle"}, {"label": "high", "description": "today"}],
}


def weight(token_id: int, prompt: Sequence[int]) -> float:
    """The log-probability of a token behind a prompt: any function that depends on both."""
    return -((token_id * 7 + len(prompt) * 3 + sum(prompt[-3:])) % 11) / 4


def numbers(call: Call) -> list[float]:
    assert isinstance(call.numbers, NextToken)
    return [weight(i, call.prompt_token_ids) - bool(call.adapter) * i / 300 for i in call.numbers.token_ids]


def served() -> Served:
    return serve(FakeBackend(numbers=numbers))


def post(body: dict[str, Any], on: Served | None = None) -> Any:
    return asyncio.run((on or served()).client.post("/v1/decisions", json=body))


def decide(*questions: Any, on: Served | None = None, **fields: Any) -> Any:
    response = post({"model": "demo", "input": TEXT, "questions": list(questions), **fields}, on)
    assert response.status_code == 200, response.text
    return response.json()


def ask(on: Served, call: Callable[[openai.AsyncOpenAI], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        client = openai.AsyncOpenAI(base_url="http://h/v1", api_key="x" * 20, http_client=on.client, max_retries=0)
        return await call(client)

    return asyncio.run(run())


def expected(prompt: str, answers: Sequence[str], *, ended: bool = False) -> list[float]:
    """By the rule, answer by answer: no tries, nothing shared."""
    sums = []
    for answer in answers:
        ids, total = list(prompt.encode()), 0.0
        for token_id in [*answer.encode(), *([EOS] if ended else [])]:
            total += weight(token_id, ids)
            ids.append(token_id)
        sums.append(total)
    weights = [math.exp(value - max(sums)) for value in sums]
    return [value / sum(weights) for value in weights]


def prompt_of(question: str) -> str:
    """As the fakes' template writes it: each message on a line."""
    return f"{TEXT}\n\n{question}\n"


def test_the_official_client_reads_all_kinds_of_answers() -> None:
    on = served()
    asked: Any = [PREDICATE, CHOICE, SCORE]
    decision = ask(on, lambda client: client.decisions.create(model="demo", input=TEXT, questions=asked))
    assert isinstance(decision, Decision)
    refund, topic, urgency = decision.answers
    assert (refund.type, refund.name, topic.type, topic.name, urgency.type) == (
        "predicate", "refund", "choice", None, "score",
    )  # fmt: skip
    yes, _ = expected(prompt_of("Money goes back.\nIs this true of the text above? Answer yes or no."), ["yes", "no"])
    assert refund.probability == pytest.approx(yes, abs=1e-6)
    listed = "Choices:\n- billing\n- bills: papers\n- true\nAnswer with one of the choices."
    found = expected(prompt_of('What is it about?\n{"a":[1]}\n' + listed), ["billing", "bills", "true"])
    assert [item.probability for item in topic.probabilities] == pytest.approx(found, abs=1e-6)
    assert [item.value for item in topic.probabilities] == ["billing", "bills", True]
    assert (topic.choice, topic.confidence) == (["billing", "bills", True][found.index(max(found))], max(
        item.probability for item in topic.probabilities
    ))  # fmt: skip
    listed = "Levels, the lowest first:\n- low\n- middle\n- high: today\nAnswer with one of the levels."
    found = expected(prompt_of("How urgent is it?\n" + listed), ["low", "middle", "high"])
    assert [(item.value, item.label) for item in urgency.probabilities] == [(0, "low"), (1, "middle"), (2, "high")]
    assert urgency.score == pytest.approx(found[1] + 2 * found[2], abs=1e-6)
    assert decision.usage.input_tokens == sum(len(call.prompt_token_ids) for call in on.backend.calls)
    assert decision.usage.total_tokens == decision.usage.input_tokens
    assert decision.usage.output_tokens == 0


def test_an_answer_that_another_begins_with_is_ended_so_that_it_is_not_always_likelier() -> None:
    """By the end of a turn, for all answers of that question."""
    question = {"type": "choice", "instructions": "x", "choices": [{"value": "no"}, {"value": "not yet"}]}
    (answer,) = decide(question)["answers"]
    prompt = prompt_of("x\nChoices:\n- no\n- not yet\nAnswer with one of the choices.")
    found = [item["probability"] for item in answer["probabilities"]]
    assert found == pytest.approx(expected(prompt, ["no", "not yet"], ended=True), abs=1e-6)


def test_a_truth_value_and_a_text_that_is_written_alike_are_two_answers() -> None:
    question = {"type": "choice", "instructions": "x", "choices": [{"value": True}, {"value": "true"}]}
    on = served()
    (answer,) = decide(question, on=on)["answers"]
    assert [item["value"] for item in answer["probabilities"]] == [True, "true"]
    assert '- true\n- "true"\n' in bytes(on.backend.calls[0].prompt_token_ids).decode()


def test_the_text_is_read_once_before_the_other_questions_and_a_question_before_its_later_places() -> None:
    """What follows may then find what it shares in the prefix cache."""
    running: list[int] = []

    def noting(call: Call) -> list[float]:
        running.append(on.backend.open_streams)
        return numbers(call)

    on = serve(FakeBackend(numbers=noting, pause_s=0.001))
    decide(*[PREDICATE] * 5, CHOICE, on=on)
    calls = on.backend.calls
    assert running[0] == 1
    assert max(running[1:]) > 1
    shared = prompt_of("").rstrip("\n").encode()
    assert all(bytes(call.prompt_token_ids[: len(shared)]) == shared for call in calls)
    is_later = [bytes(call.prompt_token_ids)[-1:] != b"\n" for call in calls]
    assert is_later == sorted(is_later)
    assert any(is_later)


def test_a_list_of_adapters_gives_a_body_for_each_and_costs_no_more_than_each_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoded: list[str] = []
    encode = Tokenizer.encode

    def counting(self: Tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
        encoded.append(text)
        return encode(self, text, add_special_tokens)

    monkeypatch.setattr(Tokenizer, "encode", counting)
    alone = {}
    num_calls = 0
    for name in ("demo", "alpha", "beta"):
        on = served()
        alone[name] = decide(PREDICATE, CHOICE, model=name, on=on)
        num_calls += len(on.backend.calls)
    num_encoded = len(encoded) // 3
    encoded.clear()
    on = served()
    together = decide(PREDICATE, CHOICE, model=list(alone), on=on)
    assert together["data"] == list(alone.values())
    assert alone["demo"]["answers"] != alone["alpha"]["answers"]
    assert len(encoded) == num_encoded
    assert len(on.backend.calls) == num_calls
    assert sorted(on.adapters.expected) == [("alpha", None), ("beta", None)]
    assert together["usage"]["input_tokens"] == sum(body["usage"]["input_tokens"] for body in alone.values())
    asked: Any = [PREDICATE]
    models: Any = ["demo", "alpha"]
    decision = ask(on, lambda client: client.decisions.create(model=models, input=TEXT, questions=asked))
    assert [item["model"] for item in decision.data] == models


def test_a_conversation_with_calls_is_told_in_turns() -> None:
    conversation = [
        {"role": "developer", "content": "Be just."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Pay me"}]},
        {"type": "function_call", "call_id": "c1", "name": "pay", "arguments": '{"sum": 3}'},
        {"type": "function_call_output", "call_id": "c1", "output": "done"},
        {"type": "custom_tool_call", "call_id": "c2", "name": "note", "input": "paid"},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "kept"}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No more."}]},
    ]
    on = served()
    decide(PREDICATE, input=conversation, on=on)
    prompt = bytes(on.backend.calls[0].prompt_token_ids).decode()
    assert prompt == (
        'Be just.\nPay me\n[call of pay] {"sum": 3}\n[result of pay] done\n[call of note] paid\n'
        "[result of note] kept\nNo more.\nMoney goes back.\nIs this true of the text above? Answer yes or no.\n"
    )


def test_without_a_chat_template_the_answer_stands_behind_a_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "has_chat_template", False)
    first, second = served(), served()
    decide(PREDICATE, on=first)
    decide(PREDICATE, input=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], on=second)
    asked = (first.backend.calls, second.backend.calls)
    prompts = {min((bytes(call.prompt_token_ids).decode() for call in calls), key=len) for calls in asked}
    question = "Money goes back.\nIs this true of the text above? Answer yes or no.\nAnswer:"
    assert prompts == {f"{TEXT}\n\n{question} ", f"user: a\n\nassistant: b\n\n{question} "}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"questions": []}, "questions", "at least 1 item"),
        ({"questions": [{"type": "box", "instructions": "x"}]}, "questions[0]", 'questions of type "box"'),
        ({"questions": [{"type": "predicate"}]}, "questions[0].instructions", "it is missing; send it"),
        ({"questions": [{**CHOICE, "choices": [{"value": "a"}]}]}, "questions[0].choices", "at least 2 item"),
        ({"questions": [{**CHOICE, "choices": [{"value": "a"}] * 2}]}, "questions[0]", "the answer 'a' is given twice"),
        ({"questions": [{**SCORE, "levels": [{"label": "a"}, {"label": " a"}]}]}, "questions[0]", "given twice"),
        ({"questions": [{**SCORE, "levels": [{"label": "a"}, {"label": " "}]}]}, "questions[0]", "but spaces"),
        ({"questions": [{**PREDICATE, "weight": 2}]}, "questions[0].weight", "weight"),
        (
            {"questions": [{**PREDICATE, "instructions": [{"type": "input_image"}]}]},
            None,
            '"input_image" parts; send text',
        ),
        ({"input": ""}, "input", "at least 1 character"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", 'items of type "item_reference"'),
        (
            {"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]},
            "input[0].call_id",
            "'c' is that of no call before it",
        ),
        ({"model": []}, "model", "neither a name nor a list"),
        ({"model": ["alpha", "alpha"]}, "model", "given twice"),
        ({"temperature": 0.5}, "temperature", "drawn answers"),
        ({"stream": True}, "stream", "the answers come at once"),
        ({"adapter_source": "local"}, "adapter_source", "model 'demo' is the base"),
    ],
)
def test_wrong_fields_are_refused_by_name(fields: dict[str, Any], param: str | None, message: str) -> None:
    response = post({"model": "demo", "input": TEXT, "questions": [PREDICATE], **fields})
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert message in error["message"]
    assert param is None or error["param"] == param


def test_fields_without_effect_are_named() -> None:
    cached = {"prompt_cache_key": "k", "prompt_cache_options": {"mode": "explicit", "ttl": "30m"}, "temperature": 0}
    part = {"type": "input_text", "text": "x", "prompt_cache_breakpoint": {"mode": "explicit"}}
    body = {"model": "demo", "input": [{"role": "user", "content": [part]}], "questions": [PREDICATE], **cached}
    told = post(body | {"safety_identifier": "u"}).headers["x-chorus-inert"]
    assert told.split(", ") == ["prompt_cache_breakpoint", *cached]


def test_places_are_where_answers_part_and_go_on() -> None:
    tree = Answers(((5, 1, 2), (5, 1, 3), (5, 4)), (9,), 100)
    assert [(place.path, place.token_ids) for place in tree.places()] == [((5,), (1, 4)), ((5, 1), (2, 3))]
    logs = [[math.log(0.6), math.log(0.2)], [math.log(0.5), math.log(0.25)]]
    assert tree.probabilities(logs) == pytest.approx([0.3 / 0.65, 0.15 / 0.65, 0.2 / 0.65])
    assert [place.path for place in Answers(((1,), (2,), (3,)), (9,), 100).places()] == [()]
    ended = Answers(((1,), (1, 2)), (9,), 100).places()
    assert [(place.path, place.token_ids) for place in ended] == [((1,), (9, 2)), ((1, 2), (9,))]
    for wrong in (((1,), (1,)), ((), (1,)), ((1,), (1, 9))):
        with pytest.raises(ValueError, match="word them otherwise"):
            Answers(wrong, (9,), 100)


def test_answers_of_no_likelihood_still_come_to_one() -> None:
    assert sum(Answers(((1,), (2,)), (9,), 100).probabilities([[-4000.0, -4001.0]])) == pytest.approx(1)


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple), min_size=2, max_size=8, unique=True),
    st.randoms(use_true_random=False),
)
def test_probabilities_by_places_are_those_answer_by_answer(answers: list[tuple[int, ...]], rng: Any) -> None:
    """For any answers, and any log-probability of a token behind any path."""
    known: dict[tuple[int, ...], float] = {}
    tree = Answers(answers, (7,), 1000)
    is_ended = any(a != b and b[: len(a)] == a for a in answers for b in answers)
    whole = [(*answer, 7) if is_ended else answer for answer in answers]
    for path in {answer[:length] for answer in whole for length in range(1, 1 + len(answer))}:
        known[path] = -rng.random() * 5
    found = tree.probabilities([[known[*p.path, i] for i in p.token_ids] for p in tree.places()])
    sums = [sum(known[answer[: length + 1]] for length in range(len(answer))) for answer in whole]
    weights = [math.exp(value - max(sums)) for value in sums]
    assert found == pytest.approx([weight / sum(weights) for weight in weights])


def test_answers_that_part_at_too_many_places_are_refused_before_they_are_all_looked_at() -> None:
    looked_at = 0

    class Counted(tuple[int, ...]):
        def __iter__(self) -> Any:
            nonlocal looked_at
            for token_id in tuple.__iter__(self):
                looked_at += 1
                yield token_id

    answers = [Counted((i, *range(100, 500))) for i in range(100)]
    with pytest.raises(TooManyPlaces):
        Answers(answers, (9,), 1000)
    assert looked_at < 3000


def test_too_many_prompts_are_refused_with_the_question_that_is_too_much() -> None:
    long = {"type": "choice", "instructions": "x", "choices": [{"value": "a" * 400}, {"value": "b" * 400}]}
    response = post({"model": ["demo", "alpha"], "input": "x", "questions": [long] * 6})
    assert response.status_code == 400
    assert "up to the 6th they need more than 4096 prompts of each model" in response.json()["error"]["message"]
