"""Whatever a body is, it is answered or refused with a 4xx that says what is wrong: 1,500 bodies, drawn from a seed."""

from __future__ import annotations

import asyncio
import copy
import json
import random
from collections import Counter
from typing import Any

import httpx
import pytest

from deployments.http import reading
from deployments.http.limits import MAX_MESSAGES, MAX_STOP_CHARS
from tests.serving.fakes import FakeBackend, Served, serve

NUM_BODIES = 300  # of each kind
GOOD: dict[str, Any] = {
    "/v1/chat/completions": {
        "model": "demo",
        "messages": [
            {"role": "system", "content": "be"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        ],
        "max_tokens": 3,
        "temperature": 0.5,
        "stop": ["x"],
        "logit_bias": {"3": 1.5},
        "stream_options": {"include_usage": True},
        "stream": True,
    },
    "/v1/completions": {"model": "alpha", "prompt": ["a", "b"], "n": 2, "seed": 7, "logprobs": 2, "echo": None},
    "/generate": {"inputs": "hi", "parameters": {"adapter_id": "alpha", "top_k": 3, "stop": ["a"], "seed": 1}},
    "/": {"inputs": "hi", "stream": False, "parameters": {"details": True}},
    "/adapters": {"name": "one", "source": "local", "location": "alpha", "sha256": {"f": "0" * 64}, "urls": {}},
    "/adapters/pin": {"name": "alpha", "source": "local"},
    "/v1/responses": {
        "model": "alpha",
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "well"}]},
        ],
        "text": {"format": {"type": "text"}},
        "tools": [{"type": "function", "name": "f", "parameters": {}}],
        "tool_choice": "none",
        "stream": False,
    },
    "/v1/messages": {
        "model": "demo",
        "max_tokens": 3,
        "system": [{"type": "text", "text": "be"}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "stop_sequences": ["x"],
    },
    "/v1/decisions": {
        "model": ["alpha", "demo"],
        "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
        "questions": [
            {"type": "choice", "instructions": "which", "choices": [{"value": "a"}, {"value": "b"}]},
            {"type": "score", "instructions": "how", "levels": [{"label": "low"}, {"label": "high"}]},
        ],
    },
    "/v1/embeddings": {"model": "demo", "input": ["a", "b"], "encoding_format": "float", "dimensions": 4},
    "/v1/score": {"model": "demo", "text_1": "a", "text_2": ["b", "c"]},
    "/v1/rerank": {"model": "demo", "query": "a", "documents": ["b", {"text": "c"}], "top_n": 1},
}
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 1.0, -0.0, 2.5, 1e300, -1e-300, 2**31, 2**53 + 1, 2**63, 2**64, -(2**64), 10**400,
    "", " ", "\0", "\x1b[2J\r\n", "a" * 5000, "é🙂\u202e", "\ud800", "x\udfff", "NaN", "null", "../../etc/passwd",
    "%s%n{}", "' OR 1=1", "{{ 7 * 7 }}", [], {}, [None], [[]], [[[1]]], [{}], {"": None}, {"a": {"b": {}}}, ["a", 1],
    [1, None], [True], [1.5], [2**70], ["a"] * 300, [0] * 5000, {str(i): i for i in range(2000)},
    {"type": "text"}, [{"type": 1}],
    [{"role": "user", "content": None}], [{"role": "user"}] * 50, {"role": "x" * 1000}, "x" * (MAX_STOP_CHARS + 1),
    [{"role": "user", "content": "a"}] * (MAX_MESSAGES + 1), [{"type": "image_url", "image_url": {"url": "u"}}],
)  # fmt: skip


def _spots(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a body."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(spot for key, item in inner for spot in _spots(item, (*path, key)))]


def _put(body: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    body = copy.deepcopy(body)
    at = body
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return body


def _replaced(rng: random.Random, body: Any) -> bytes:
    """One or two places hold something odd."""
    for _ in range(rng.choice((1, 1, 2))):
        body = _put(body, rng.choice(_spots(body)), rng.choice(ODD))
    return json.dumps(body, ensure_ascii=rng.random() < 0.7).encode(errors="surrogatepass")


def _extended(rng: random.Random, body: Any) -> bytes:
    """Some object has a field more, known to others or to nobody."""
    names = (
        "tools", "guided_json", "chat_template_kwargs", "priority", "n", "best_of", "stop_token_ids", "user", "prompt",
        "request_id", "messages", "typical_p", "Ünïcode", "", "a[0].b", "__class__", "body", "str", "x" * 3000, "\n",
    )  # fmt: skip
    spots = [spot for spot in _spots(body) if isinstance(_at(body, spot), dict)]
    return json.dumps(_put(body, (*rng.choice(spots), rng.choice(names)), rng.choice(ODD))).encode()


def _at(body: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        body = body[key]
    return body


def _broken(rng: random.Random, body: Any) -> bytes:
    """The text is cut, or has bytes too many, too few or of another encoding."""
    text = json.dumps(body).encode()
    at = rng.randrange(len(text))
    pieces = (
        b"\xff",
        b"\xed\xa0\x80",
        b"\0",
        b",",
        b'"',
        b"\\",
        b"]",
        b"{",
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"\xef\xbb\xbf",
    )
    kind = rng.randrange(6)
    if kind == 0:
        return text[:at]
    if kind == 1:
        return text[:at] + rng.choice(pieces) + text[at:]
    if kind == 2:
        return text[:at] + text[at + 1 + rng.randrange(3) :]
    if kind == 3:
        return text + rng.choice(pieces)
    if kind == 4:
        return json.dumps(body).encode(rng.choice(("utf-16", "utf-32", "utf-16-be")))
    return text[:at] + bytes(rng.randrange(256) for _ in range(4)) + text[at:]


def _twice(rng: random.Random, body: Any) -> bytes:
    """Some object names a field twice, with one value or with another."""
    spots = [spot for spot in _spots(body) if isinstance(_at(body, spot), dict) and _at(body, spot)]
    spot = rng.choice(spots)
    name = rng.choice(list(_at(body, spot)))
    marked = json.dumps(_put(body, (*spot, name), "@@"))
    first = json.dumps(_at(body, (*spot, name)))
    again = json.dumps(rng.choice((_at(body, (*spot, name)), None, 1, "b", [])))
    return marked.replace('"@@"', f"{first}, {json.dumps(name)}: {again}", 1).encode()


def _heavy(rng: random.Random, body: Any) -> bytes:
    """As much of one thing as fits in the bytes that are allowed, or nearly."""
    n = rng.choice((50, 1000, 40_000))
    value = rng.choice(
        (
            "[" * n + "]" * n, "[" + "{}," * n + "1]", "[" + "1," * n + "1]", "[" + "1.5," * n + "0]",
            '"' + "\\n" * n + '"', '"' + "\\ud83d\\ude42" * n + '"', '"' + "\\ud83d" * n + '"',
            "1" * n, "1." + "1" * n, "1e" + "9" * min(n, 400), "-" * n, '{"a":' * n + "1" + "}" * n,
            "{" + ",".join(f'"{i}":{i}' for i in range(n)) + "}", "[" + '"a",' * n + '"b"]',
        )
    )  # fmt: skip
    return json.dumps(_put(body, rng.choice(_spots(body)[1:]), "@@")).replace('"@@"', value, 1).encode()


async def _answers(served: Served, bodies: list[tuple[str, bytes]]) -> list[httpx.Response]:
    headers = {"content-type": "application/json"}
    return [await served.client.post(path, content=text, headers=headers) for path, text in bodies]


@pytest.mark.parametrize("make", [_replaced, _extended, _broken, _twice, _heavy], ids=lambda make: make.__name__)
def test_no_body_is_a_surprise(make: Any):
    rng = random.Random(make.__name__)
    paths = list(GOOD)
    bodies = [(path, make(rng, GOOD[path])) for path in (paths[i % len(paths)] for i in range(NUM_BODIES))]
    served = serve(FakeBackend(reply=lambda call: "ok"))
    statuses: Counter[int] = Counter()
    for (path, text), response in zip(bodies, asyncio.run(_answers(served, bodies)), strict=True):
        shown = (path, text[:200], response.status_code, response.text[:300])
        statuses[response.status_code] += 1
        assert response.status_code < 500, shown
        if response.status_code != 200:
            assert response.status_code >= 400, shown
            body = response.json()
            error = body["error"] if isinstance(body["error"], dict) else {"message": body["error"]}
            assert error["message"], shown
            assert len(response.content) < 3000, shown  # a refusal does not repeat what was sent
        elif "text/event-stream" in response.headers["content-type"]:
            assert '"error"' not in response.text, shown
    assert statuses[200] < NUM_BODIES
    assert sum(statuses.values()) == NUM_BODIES
    assert served.backend.open_streams == 0


@pytest.mark.parametrize("path", GOOD)
def test_a_field_that_is_given_twice_is_refused_by_name(path: str):
    rng = random.Random(path)
    bodies = [(path, _twice(rng, GOOD[path])) for _ in range(20)]
    for (_, text), response in zip(bodies, asyncio.run(_answers(serve(), bodies)), strict=True):
        assert "is given twice in one object; send it once" in response.text, (text, response.text)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"model": "demo", "prompt": "a\\ud800"}', "prompt"),
        ('{"model": "\\udc00", "prompt": "a"}', "model"),
        ('{"model": "demo", "prompt": ["a", "\\ud83d"]}', "prompt[1]"),
        ('{"model": "demo", "prompt": "a", "stop": ["\\ud83dx"]}', "stop[0]"),
        ('{"model": "demo", "prompt": "a", "user": "\\udead"}', "user"),
        ('{"model": "demo", "prompt": "a", "metadata": {"k": "\\ud800"}}', "metadata.k"),
    ],
)
def test_half_a_surrogate_pair_is_named_by_its_field(text: str, named: str):
    (response,) = asyncio.run(_answers(serve(), [("/v1/completions", text.encode())]))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == named
    assert "not valid Unicode" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
@pytest.mark.parametrize("path", GOOD)
def test_a_body_of_another_type_is_refused_with_the_type_to_send(path: str, content_type: str | None):
    headers = {} if content_type is None else {"content-type": content_type}
    response = asyncio.run(serve().client.post(path, content=json.dumps(GOOD[path]), headers=headers))
    assert response.status_code == 415
    assert "application/json" in response.text


@pytest.mark.parametrize("kind", [["text"], {}, 5], ids=str)
@pytest.mark.parametrize(
    ("path", "spot"),
    [
        ("/v1/messages", ("messages", 0, "content", 0)),
        ("/v1/messages", ("system", 0)),
        ("/v1/responses", ("input", 0)),
        ("/v1/responses", ("input", 0, "content", 0)),
        ("/v1/responses", ("tools", 0)),
        ("/v1/decisions", ("input", 0)),
        ("/v1/decisions", ("input", 0, "content", 0)),
        ("/v1/decisions", ("questions", 0)),
    ],
    ids=str,
)
def test_a_type_that_is_no_string_is_refused_where_it_stands(path: str, spot: tuple[Any, ...], kind: Any):
    text = json.dumps(_put(GOOD[path], (*spot, "type"), kind)).encode()
    (response,) = asyncio.run(_answers(serve(), [(path, text)]))
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(f"{spot[0]}[0]")
    assert "_kind()" not in response.text  # how we tell types apart is no caller's business


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/messages", "stop_sequences"),
        ("/v1/messages", "tools"),
        ("/v1/responses", "stop"),
        ("/v1/responses", "include"),
        ("/v1/responses", "tools"),
        ("/v1/chat/completions", "tools"),
        ("/v1/chat/completions", "documents"),
        ("/v1/decisions", "questions"),
    ],
)
def test_a_list_of_wrong_things_is_read_to_its_first(path: str, field: str, monkeypatch: pytest.MonkeyPatch):
    found: list[int] = []
    counted = reading.fault_of_validation

    def count(errors: Any, kind: Any = None) -> Any:
        found.append(len(errors))
        return counted(errors, kind)

    monkeypatch.setattr(reading, "fault_of_validation", count)
    text = json.dumps({**GOOD[path], field: [1] * 1000}).encode()
    (response,) = asyncio.run(_answers(serve(), [(path, text)]))
    assert (response.status_code, found) == (400, [1])
