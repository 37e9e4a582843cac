"""The route of decisions: tokens once, then waves of prompts, each as soon as what it shares is there."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from deployments.asks import Ask, Chat, adapter_of
from deployments.http.decisions import examples, replies
from deployments.http.decisions.likelihoods import Answers, Place, Tokens, TooManyPlaces
from deployments.http.decisions.schema import DecisionRequest
from deployments.http.decisions.wording import BREAK, messages_of, plain_text, worded
from deployments.http.documented import answers, failures
from deployments.http.limits import MAX_BRANCHES
from deployments.http.openai.replies import error_body
from deployments.http.responses import inert_header
from deployments.router.gateway import Gateway
from deployments.router.vectors import Answered
from engine.errors import InvalidRequest
from engine.pooling import NextToken, as_floats
from engine.request import SamplingParams

WAVE = 256  # prompts that are made at a time
WAVE_TOKENS = 1 << 20  # of them all together, but for a few: each is as long as the text
SHARED_TOKENS = 64  # a text of more is read once before all questions but the first are put


@dataclass(frozen=True, slots=True)
class _Question:
    tokens: Tokens  # behind the text
    answers: Answers
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class _Prompt:
    """One row that is asked for: of which model, question and place."""

    model: int
    question: int
    place: int


def routes(gateway: Gateway, route_class: type[APIRoute]) -> APIRouter:
    """/v1/decisions."""
    told = failures(lambda answer: answer.status, error_body)
    router = APIRouter(prefix="/v1", tags=["OpenAI"], responses=told, route_class=route_class)

    @router.post("/decisions", responses=answers(examples.ANSWER))
    async def decisions(body: DecisionRequest, request: Request) -> Response:
        """Questions about a text, answered by how likely the model finds each answer. `model` may be a list of
        adapters: then `data` has a body for each, in their order."""
        names = (body.model,) if isinstance(body.model, str) else body.model
        asks = [_ask(body, name, gateway.model_id) for name in names]
        tenant = request.state.caller.tenant
        ids = [gateway.admit(ask, tenant) for ask in asks]
        text, questions = await _read(gateway, body, MAX_BRANCHES // len(asks))
        prompts = [
            _Prompt(model, index, place)
            for model in range(len(asks))
            for index, question in enumerate(questions)
            for place in range(len(question.places))
        ]
        found: dict[_Prompt, Answered] = {}
        for number, wave in enumerate(_waves(prompts, len(text))):
            asked = [_asked(asks, questions, text, prompt) for prompt in wave]
            got = await gateway.vectors_of(asked, tenant, f"{ids[0]}.{number}")
            found |= zip(wave, got, strict=True)
        bodies = [_body(body, name, questions, model, found) for model, name in enumerate(names)]
        headers = inert_header(request.state.inert)
        if isinstance(body.model, str):
            return JSONResponse(bodies[0], headers=headers)
        whole = {"object": "list", "data": bodies, "usage": replies.usage(list(found.values()))}
        return JSONResponse(whole, headers=headers)

    return router


def _ask(body: DecisionRequest, name: str, model_id: str) -> Ask:
    """Raises: InvalidRequest."""
    adapter = adapter_of(name, model_id)
    if adapter is None and body.adapter_source is not None and isinstance(body.model, str):
        raise InvalidRequest("adapter_source", f"model {name!r} is the base; name an adapter in model")
    return Ask(
        prompts=(),
        params=SamplingParams(max_tokens=1),
        adapter=adapter,
        adapter_source=None if adapter is None else body.adapter_source,
        cache_salt=body.cache_salt or "",
        user=body.safety_identifier or "",
        prompt_param="input",
    )


async def _read(gateway: Gateway, body: DecisionRequest, most: int) -> tuple[Tokens, list[_Question]]:
    """Tokens of the text and of the questions, for all models; places for at most `most` prompts of each of them.

    Raises: InvalidRequest; Refused.
    """
    wordings = [worded(question, f"questions[{index}]") for index, question in enumerate(body.questions)]
    prompts = gateway.prompts
    is_chat = prompts.has_chat_template
    if is_chat:
        gap = secrets.token_hex(16)
        before, after = await prompts.around(Chat(messages_of(body.input, gap)), gap, "input")
        lead, end = "", prompts.eos_token_id
    else:
        before, after, lead, end = plain_text(body.input) + BREAK, "\nAnswer:", " ", None
    texts = list(dict.fromkeys(lead + answer for wording in wordings for answer in wording.answers))
    pieces = [*(wording.text + after for wording in wordings), *texts, "\n"]
    text, tokens = await prompts.forked(before, pieces, "input", add_special_tokens=not is_chat)
    ending = tokens[-1] if end is None else (end,)
    known = dict(zip(texts, tokens[len(wordings) : -1], strict=True))
    given = [[known[lead + answer] for answer in wording.answers] for wording in wordings]
    # Beside the event loop: as long as the body.
    return text, await asyncio.to_thread(_questions, tokens[: len(wordings)], given, ending, most)


def _questions(tokens: Sequence[Tokens], given: Sequence[Sequence[Tokens]], end: Tokens, most: int) -> list[_Question]:
    """Raises: InvalidRequest."""
    questions: list[_Question] = []
    num_places = 0
    for index, (asked, told) in enumerate(zip(tokens, given, strict=True)):
        try:
            tree = Answers(told, end, most)
            places = tree.places()
            num_places += len(places)
            if num_places > most:
                raise TooManyPlaces
        except TooManyPlaces:
            says = f"up to the {index + 1}th they need more than {most} prompts of each model, of {MAX_BRANCHES} in all"
            raise InvalidRequest("questions", f"{says}; ask fewer, of fewer models, or with shorter answers") from None
        except ValueError as error:
            raise InvalidRequest(f"questions[{index}]", str(error)) from error
        questions.append(_Question(asked, tree, places))
    return questions


def _waves(prompts: Sequence[_Prompt], text_tokens: int) -> list[list[_Prompt]]:
    """In an order in which what prompts share is read once: the text by each model's first question, a question by
    its first place."""
    is_long = text_tokens > SHARED_TOKENS
    first = [prompt for prompt in prompts if is_long and (prompt.question, prompt.place) == (0, 0)]
    roots = [prompt for prompt in prompts if prompt.place == 0 and not (is_long and prompt.question == 0)]
    rest = [prompt for prompt in prompts if prompt.place]
    size = max(8, min(WAVE, WAVE_TOKENS // max(1, text_tokens)))
    return [part[at : at + size] for part in (first, roots, rest) for at in range(0, len(part), size)]


def _asked(asks: Sequence[Ask], questions: Sequence[_Question], text: Tokens, prompt: _Prompt) -> tuple[Ask, Tokens]:
    question = questions[prompt.question]
    place = question.places[prompt.place]
    ask = replace(asks[prompt.model], numbers=NextToken(token_ids=place.token_ids))
    return ask, text + question.tokens + place.path


def _body(
    body: DecisionRequest, name: str, questions: Sequence[_Question], model: int, found: dict[_Prompt, Answered]
) -> dict[str, Any]:
    mine = {prompt: one for prompt, one in found.items() if prompt.model == model}
    told = []
    for index, (asked, question) in enumerate(zip(body.questions, questions, strict=True)):
        logprobs = [as_floats(mine[_Prompt(model, index, place)].vector) for place in range(len(question.places))]
        told.append(replies.answer(asked, question.answers.probabilities(logprobs)))
    return {"answers": told, "model": name, "usage": replies.usage(list(mine.values()))}
