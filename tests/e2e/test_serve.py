"""What a user of a running server is promised, through the clients that users have. Tests run in the order written."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from demo.checkpoint import load_adapter, load_base, load_tokenizer
from demo.evaluate import answers
from demo.text import held_out
from demo.transforms import TRANSFORMS
from tests.e2e.bad_adapters import BAD
from tests.e2e.conftest import ADAPTERS, Bucket
from tests.e2e.server import ADMIN_KEY, KEY, ROOT, Server
from tests.support.waiting import patience, until

pytestmark = [
    pytest.mark.ray,
    # peft asks transformers in words that transformers has replaced.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

LORAX_PYTHON = ROOT / ".venv-lorax" / "bin" / "python"
MODELS = ["demo", *sorted(path.parent.name for path in ADAPTERS.glob("*/adapter_model.safetensors"))]
LISTED = ["hello world", "serve many voices", "Python and Ray"]
LONG = {"max_tokens": 300, "temperature": 0.0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, str], str]:
    """PEFT's own greedy answers: (model, prompt) -> text."""
    tokenizer = load_tokenizer()
    found = {}
    for name in MODELS:
        prompts = [f"{line}\n" for line in LISTED] + [e.prompt for e in held_out("base", str, 5, seed=11)]
        model = load_base() if name == "demo" else load_adapter(name)
        found |= {(name, p): text for p, text in zip(prompts, answers(model, tokenizer, prompts), strict=True)}
    return found


def _client(server: Server, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120.0, **options)


async def _complete(client: openai.AsyncOpenAI, model: str, prompt: str, *, stream: bool = False, **fields: Any) -> str:
    fields = {"max_tokens": 128, "temperature": 0.0} | fields
    if not stream:
        reply = await client.completions.create(model=model, prompt=prompt, **fields)
        return reply.choices[0].text
    return "".join([text async for text in _stream(client, model, prompt, **fields)])


async def _stream(client: openai.AsyncOpenAI, model: str, prompt: str, **fields: Any) -> AsyncIterator[str]:
    async for chunk in await client.completions.create(model=model, prompt=prompt, stream=True, **fields):
        yield chunk.choices[0].text


def test_64_concurrent_requests_over_all_adapters_answer_as_peft_does(
    server: Server, expected: dict[tuple[str, str], str]
):
    wanted = [key for key, text in expected.items() if not text.endswith("…")]  # those that end by themselves
    jobs = (wanted * (64 // len(wanted) + 1))[: max(64, len(wanted))]

    async def ask() -> list[str]:
        texts: list[str] = []
        async with _client(server) as client:
            # More at once than the server queues would be refused.
            for at in range(0, len(jobs), 64):
                wave = enumerate(jobs[at : at + 64])
                texts += await asyncio.gather(*(_complete(client, m, p, stream=bool(i % 2)) for i, (m, p) in wave))
        return texts

    assert {model for model, _ in jobs} == set(MODELS)
    assert asyncio.run(ask()) == [expected[job] for job in jobs]


def test_the_listed_inputs_are_transformed(server: Server):
    async def ask() -> dict[tuple[str, str], str]:
        keys = [(name, line) for name in MODELS[1:] for line in LISTED]
        async with _client(server) as client:
            texts = await asyncio.gather(*(_complete(client, name, f"{line}\n") for name, line in keys))
        return dict(zip(keys, texts, strict=True))

    got = asyncio.run(ask())
    assert got == {(name, line): TRANSFORMS[name](line) for name, line in got}


def test_a_chat_is_answered_whole_and_streamed(server: Server):
    async def ask() -> tuple[str | None, str]:
        async with _client(server) as client:
            messages: Any = [{"role": "user", "content": "hello world"}]
            whole = await client.chat.completions.create(model="upper", messages=messages, temperature=0)
            stream = await client.chat.completions.create(model="upper", messages=messages, temperature=0, stream=True)
            parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
            return whole.choices[0].message.content, "".join(parts)

    assert asyncio.run(ask()) == ("HELLO WORLD", "HELLO WORLD")


def test_an_answer_has_the_form_that_is_asked_for(server: Server):
    schema = {
        "type": "object",
        "properties": {
            "city": {"enum": ["Rome", "Oslo"]},
            "people": {"type": "integer", "minimum": 0, "maximum": 9999},
        },
        "required": ["city", "people"],
        "additionalProperties": False,
    }
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "town", "schema": schema, "strict": True}}
    unheard: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"not": {}}}}
    messages: Any = [{"role": "user", "content": "hello world"}]

    async def ask() -> list[str]:
        async with _client(server) as client:
            create = client.chat.completions.create
            whole = await create(model="upper", messages=messages, response_format=wanted, temperature=0)
            stream = await create(model="demo", messages=messages, response_format=wanted, stream=True, n=2)
            said: dict[int, str] = {}
            async for chunk in stream:
                choice = chunk.choices[0]
                said[choice.index] = said.get(choice.index, "") + (choice.delta.content or "")
            with pytest.raises(openai.BadRequestError, match="response_format: this json_schema cannot be followed"):
                await create(model="demo", messages=messages, response_format=unheard)
            return [whole.choices[0].message.content or "", *said.values()]

    answers = [json.loads(text) for text in asyncio.run(ask())]
    assert len(answers) == 3
    for answer in answers:
        assert set(answer) == {"city", "people"}
        assert answer["city"] in ("Rome", "Oslo")


def test_every_adapter_is_listed(server: Server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
        listed = {model.id for model in client.models.list()}
    assert {*MODELS, "remote"} <= listed


def test_lorax_client_works_unchanged(server: Server):
    if not LORAX_PYTHON.exists():
        pytest.fail(f"{LORAX_PYTHON.relative_to(ROOT)} is missing; `make test` makes it")
    script = ROOT / "tests" / "e2e" / "lorax_script.py"
    done = subprocess.run(
        [str(LORAX_PYTHON), str(script), server.url, KEY, "hello world\n", "upper"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert got["whole"] == got["streamed"] == got["last"] == "HELLO WORLD"
    assert got["base"] == "hello world"
    assert (got["finish"], got["last_finish"]) == ("eos_token", "eos_token")
    assert (got["num_tokens"], got["num_alternatives"]) == ([12, 12], 2)
    assert got["stopped"] == ["hell", "stop_sequence"]
    assert "no-such-adapter" in got["errors"]["missing"]
    assert "watermark" in got["errors"]["watermark"]
    assert [json.loads(text)["word"] in ("left", "right") for text in got["formed"]] == [True] * 3


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_adapter_is_refused_with_the_reason_and_the_server_goes_on(server: Server, kind: str):
    body = {"model": f"bad-{kind}", "prompt": "hello\n", "temperature": 0}
    response = server.client.post("/v1/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (422, "adapter_rejected"), error
    assert f"bad-{kind}" in error["message"]
    good = server.client.post("/v1/completions", json=body | {"model": "upper"})
    assert good.json()["choices"][0]["text"] == "HELLO"


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"model": "no-such-adapter"}, 404, "model_not_found"),
        ({"model": "../demo/base"}, 400, "adapter_name_invalid"),
        ({"temprature": 1}, 400, "unknown_parameter"),
        ({"prompt": "x" * 5000}, 400, "context_length_exceeded"),
        ({"suffix": "x"}, 400, "unsupported_parameter"),
    ],
)
def test_a_bad_request_is_refused(server: Server, fields: dict[str, Any], status: int, code: str):
    response = server.client.post("/v1/completions", json={"model": "demo", "prompt": "x\n"} | fields)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


def test_without_a_key_nobody_is_served(server: Server):
    response = server.client.get("/v1/models", headers={"authorization": "Bearer no"})
    assert response.status_code == 401


def test_a_full_queue_says_so_and_clients_that_leave_free_their_sequences(server: Server):
    async def flood() -> list[openai.RateLimitError]:
        async with _client(server) as client:
            tasks = [
                asyncio.ensure_future(_complete(client, "demo", f"{i}\n", stream=True, **LONG)) for i in range(110)
            ]
            done, running = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION, timeout=60)
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await asyncio.sleep(0.5)  # connections of those that left are closed by the loop, not with it
            return [task.exception() for task in done if isinstance(task.exception(), openai.RateLimitError)]

    refused = asyncio.run(flood())
    assert refused
    assert refused[0].response.headers["retry-after"]
    server.wait_until(lambda: server.in_engines() == 0, "empty engines", 60)


def test_an_adapter_uploaded_again_is_new_for_new_requests_and_old_for_running_ones(server: Server, bucket: Bucket):
    async def run() -> tuple[str, str, str]:
        async with _client(server) as client:
            before = await _complete(client, "remote", "hello world\n", **LONG)
            running = _stream(client, "remote", "hello world\n", **LONG)
            text = await anext(running)
            bucket.upload("remote", ADAPTERS / "double")
            for _ in patience("the answers of the new adapter"):
                if (new := await _complete(client, "remote", "hello\n")) == "hheelllloo":
                    break
                await asyncio.sleep(0.2)
            text += "".join([part async for part in running])
            return before, text, new

    before, text, new = asyncio.run(run())
    assert before.startswith("HELLO WORLD")
    assert (text, new) == (before, "hheelllloo")


def test_an_adapter_that_is_registered_is_served_under_its_name_until_it_is_taken_back(server: Server):
    row = {"name": "team/shout", "source": "local", "location": "upper"}
    body = {"model": row["name"], "prompt": "hello\n", "temperature": 0}
    admin = {"authorization": f"Bearer {ADMIN_KEY}"}
    assert server.client.post("/v1/completions", json=body).status_code == 404
    assert server.client.post("/adapters", json=row).status_code == 403, "a key that may ask may not change"
    assert server.client.post("/adapters", json=row, headers=admin).json() == {"registered": 1}
    # That the name was not there is remembered for a moment.
    server.wait_until(
        lambda: server.client.post("/v1/completions", json=body).status_code == 200, "the new name to be served", 60
    )
    assert server.client.post("/v1/completions", json=body).json()["choices"][0]["text"] == "HELLO"
    assert row["name"] in {entry["id"] for entry in server.client.get("/v1/models").json()["data"]}
    gone = server.client.delete(f"/adapters/{row['name']}", headers=admin)
    assert gone.json() == {"unregistered": [row["name"]]}
    server.wait_until(
        lambda: server.client.post("/v1/completions", json=body).status_code == 404, "the name to be gone", 60
    )


def _kill(server: Server, title: str) -> None:
    (pid, *_) = server.processes(title)
    os.kill(pid, signal.SIGKILL)


def test_a_killed_replica_loses_no_request_and_its_streams_go_on(server: Server):
    async def run() -> tuple[list[str], list[str], float]:
        prompts = [f"line {i}\n" for i in range(6)]
        async with _client(server) as client:
            before = await asyncio.gather(*(_complete(client, "upper", p, **LONG) for p in prompts))
            streams = [_stream(client, "upper", p, **LONG) for p in prompts]
            texts = [await anext(stream) for stream in streams]
            victim = max(server.stats()["replicas"], key=lambda replica: int(replica["in_hand"]))
            assert victim["in_hand"] > 0
            os.kill(victim["pid"], signal.SIGKILL)
            killed = time.monotonic()
            later = [asyncio.ensure_future(_complete(client, "upper", "hello\n")) for _ in range(20)]
            rest = [asyncio.ensure_future(_rest(stream)) for stream in streams]
            texts = [text + more for text, more in zip(texts, await asyncio.gather(*rest), strict=True)]
            assert set(await asyncio.gather(*later)) == {"HELLO"}
            return before, texts, killed

    before, texts, killed = asyncio.run(run())
    assert texts == before
    server.wait_until(lambda: len(server.stats()["replicas"]) == 2, "two replicas", 120)
    print(f"killed replica: both serve again after {time.monotonic() - killed:.1f} s")


def test_the_stats_tell_what_each_engine_was_given_and_has_chosen(server: Server):
    for replica in server.stats()["replicas"]:
        sizes = replica["engine"]["sizes"]
        assert sizes["kv_cache_bytes"] <= 33554432  # as serve_config.yaml says; the rest is of this machine
        assert sizes["max_model_len"] >= 256
        assert sizes["memory_bytes"] > 0
        assert "shared by 2 replicas" in sizes["why"] or "are free" in sizes["why"]


def test_requests_wait_while_no_replica_lives(server: Server):
    for replica in server.stats()["replicas"]:
        os.kill(replica["pid"], signal.SIGKILL)

    async def ask() -> list[str]:
        async with _client(server) as client:
            return await asyncio.gather(*(_complete(client, name, "hello\n") for name in MODELS[1:]))

    assert asyncio.run(ask()) == [TRANSFORMS[name]("hello") for name in MODELS[1:]]
    server.wait_until(lambda: len(server.stats()["replicas"]) == 2, "two replicas", 120)


async def _rest(stream: AsyncIterator[str]) -> str:
    return "".join([text async for text in stream])


def test_a_killed_adapter_store_loses_no_request(server: Server):
    _kill(server, "AdapterStoreActor")
    killed = time.monotonic()

    async def ask() -> list[str]:
        async with _client(server) as client:
            names = [name for name in MODELS[1:] for _ in range(3)]
            return await asyncio.gather(*(_complete(client, name, "hello\n") for name in names))

    assert set(asyncio.run(ask())) == {TRANSFORMS[name]("hello") for name in MODELS[1:]}
    server.wait_until(lambda: server.client.get("/v1/models").status_code == 200, "the listing to work again", 60)
    print(f"killed store: listing again after {time.monotonic() - killed:.1f} s")


def test_ctrl_c_ends_everything_and_says_so_with_code_0(last_server: Server):
    assert last_server.stop() == 0
    until(lambda: not last_server.processes(), lambda: f"the end of {last_server.processes()}")
