"""The engine for concurrent callers: streams, callers that go away, refusals."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

import engine.request
from engine.aio.async_engine import AsyncEngine
from engine.errors import AdapterError, InvalidRequest
from engine.request import FinishReason, OutputDelta
from tests.engine_api.alphabet import AlphabetRunner, make_image, make_request
from tests.engine_api.async_help import Owner, collect, running, text_of, wait_for
from tests.support.waiting import ended, until_async


def test_many_requests_stream_at_once_and_each_gets_its_own_text() -> None:
    async def main(engine: AsyncEngine) -> None:
        prompts = [chr(ord("a") + i % 20) for i in range(40)]
        requests = [make_request(f"r{i}", prompt, max_tokens=3) for i, prompt in enumerate(prompts)]
        texts = await asyncio.gather(*[text_of(engine.generate(request)) for request in requests])
        assert texts == ["".join(chr(ord(prompt) + k) for k in (1, 2, 3)) for prompt in prompts]

    with running(max_queued_requests=64) as engine:
        wait_for(main(engine))


def test_deltas_carry_the_caller_s_request_id_and_end_with_one_finish_reason_per_sample() -> None:
    async def main(engine: AsyncEngine) -> None:
        deltas = await collect(engine.generate(make_request("mine", n=3)))
        assert {delta.request_id for delta in deltas} == {"mine"}
        for index in range(3):
            own = [delta for delta in deltas if delta.sample_index == index]
            assert "".join(delta.text for delta in own) == "bcdefghi"
            assert [delta.finish_reason for delta in own if delta.finish_reason] == [FinishReason.LENGTH]
            assert own[-1].finish_reason is FinishReason.LENGTH

    with running() as engine:
        wait_for(main(engine))


def test_a_slow_consumer_gets_all_tokens_since_its_last_delta_as_one() -> None:
    async def main(engine: AsyncEngine) -> None:
        stream = engine.generate(make_request(max_tokens=30, logprobs=None))
        deltas = [await anext(stream)]
        await until_async(lambda: engine.stats().total_generated_tokens == 30, "all 30 tokens")
        # Turns are delivered in order: when a later request has its text, all of the first one's waits in its stream.
        await text_of(engine.generate(make_request("later")))
        deltas += await collect(stream)
        assert len(deltas) <= 2
        assert sum(len(delta.token_ids) for delta in deltas) == 30

    with running() as engine:
        wait_for(main(engine))


def test_the_event_loop_is_woken_once_per_step_however_many_streams_it_has() -> None:
    async def main(engine: AsyncEngine) -> None:
        loop = asyncio.get_running_loop()
        wake_ups = []
        call_soon = loop.call_soon_threadsafe

        def counted(*args: Any, **kwargs: Any) -> Any:
            wake_ups.append(args)
            return call_soon(*args, **kwargs)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        requests = [make_request(str(i), max_tokens=30) for i in range(8)]
        texts = await asyncio.gather(*[text_of(engine.generate(request)) for request in requests])
        assert len(set(texts)) == 1
        await until_async(lambda: engine.stats().total_generated_tokens == 240, "all 240 tokens")
        assert 0 < len(wake_ups) <= engine.stats().total_steps

    with running() as engine:
        wait_for(main(engine))


@pytest.mark.parametrize(("settings", "prepared"), [({}, ["k1", "k2"]), ({"adapter_memory": "pages"}, [])])
def test_an_image_to_be_borrowed_is_prepared_once_and_not_on_the_step(
    settings: dict[str, str], prepared: list[str]
) -> None:
    async def main(engine: AsyncEngine) -> None:
        images = [make_image("k1"), make_image("k2")]
        for image in images * 2:
            assert await text_of(engine.generate(make_request(adapter=image.key), image)) == "cegikmoq"

    runner = AlphabetRunner()
    with running(runner, block_bytes=64, **settings) as engine:
        wait_for(main(engine))
    assert [key for key, _ in runner.prepared] == prepared
    assert "chorus-engine" not in {thread for _, thread in runner.prepared}


def test_two_callers_may_use_the_same_request_id() -> None:
    async def main(engine: AsyncEngine) -> None:
        streams = [engine.generate(make_request("same", prompt)) for prompt in "ab"]
        assert await asyncio.gather(*map(text_of, streams)) == ["bcdefghi", "cdefghij"]

    with running() as engine:
        wait_for(main(engine))


def test_a_prompt_is_checked_where_it_is_made_into_a_request_and_not_again(monkeypatch: pytest.MonkeyPatch) -> None:
    request = make_request("a" * 1024, "ab", max_tokens=3)
    looked_at: list[str] = []
    check = engine.request._token_ids
    monkeypatch.setattr(engine.request, "_token_ids", lambda name, *more: looked_at.append(name) or check(name, *more))
    with running() as served:
        assert wait_for(text_of(served.generate(request))) != ""
    assert looked_at == []
    make_request("b", "ab", max_tokens=3)
    assert "prompt_token_ids" in looked_at
    renamed = request.renamed("b")
    assert (renamed.request_id, request.request_id) == ("b", "a" * 1024)
    assert renamed == replace(request, request_id="b")
    assert renamed.prompt_token_ids is request.prompt_token_ids


def test_streams_may_belong_to_different_event_loops() -> None:
    with running() as engine:
        texts: dict[str, str] = {}

        def in_a_loop_of_its_own(prompt: str) -> None:
            texts[prompt] = wait_for(text_of(engine.generate(make_request(prompt, prompt))))

        threads = [threading.Thread(target=in_a_loop_of_its_own, args=(prompt,)) for prompt in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            ended(thread, "the streams of one event loop")
        assert texts == {"a": "bcdefghi", "b": "cdefghij", "c": "defghijk", "d": "efghijkl"}


def test_a_stop_string_ends_the_stream_and_the_sequence() -> None:
    async def main(engine: AsyncEngine) -> None:
        deltas = await collect(engine.generate(make_request(stop=("fg",), max_tokens=100)))
        assert "".join(delta.text for delta in deltas) == "bcde"
        assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (FinishReason.STOP, "fg")
        await until_async(lambda: engine.stats().running == 0, "no sequence to be running")

    with running() as engine:
        wait_for(main(engine))


def test_a_resumed_request_streams_only_what_is_new() -> None:
    async def main(engine: AsyncEngine) -> None:
        request = make_request(resumed_output_token_ids=tuple(b"bcd"), stop=("def",), max_tokens=20)
        assert await text_of(engine.generate(request)) == ""
        request = make_request(resumed_output_token_ids=tuple(b"bcd"), max_tokens=6)
        assert await text_of(engine.generate(request)) == "efg"

    with running() as engine:
        wait_for(main(engine))


# ---- callers that go away


@pytest.mark.parametrize("how", ["aclose", "cancel"])
def test_a_caller_that_goes_away_frees_its_blocks(how: str) -> None:
    async def main(engine: AsyncEngine) -> None:
        free_blocks = engine.stats().free_blocks
        stream = engine.generate(make_request(max_tokens=None))
        await anext(stream)
        await until_async(lambda: engine.stats().free_blocks < free_blocks, "blocks to be taken")
        runner.gate.clear()
        if how == "aclose":
            await stream.aclose()
        else:
            task = asyncio.ensure_future(collect(stream))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        num_plans = len(runner.plans)
        runner.gate.set()
        await until_async(lambda: engine.stats().free_blocks == free_blocks, "the blocks to be free again")
        # The plan that waited at the gate, and at most one that was scheduled before the abort was seen.
        assert len(runner.plans) <= num_plans + 1

    runner = AlphabetRunner()
    with running(runner, enable_prefix_caching=False, max_model_len=100_000, num_blocks=10_000) as engine:
        wait_for(main(engine))


def test_a_caller_whose_event_loop_is_gone_is_taken_for_gone() -> None:
    async def leave_behind(engine: AsyncEngine) -> AsyncIterator[OutputDelta]:
        stream = engine.generate(make_request(max_tokens=None))
        await anext(stream)
        return stream

    with running(max_model_len=100_000, num_blocks=10_000) as engine:
        loop = asyncio.new_event_loop()
        stream = loop.run_until_complete(leave_behind(engine))
        loop.close()
        wait_for(until_async(lambda: engine.stats().running == 0, "no sequence to be running"))
        assert engine.is_alive
        del stream


# ---- refusals


def test_a_refused_request_raises_at_the_first_item_and_the_engine_goes_on() -> None:
    async def main(engine: AsyncEngine) -> None:
        with pytest.raises(InvalidRequest, match="stop_token_ids"):
            await anext(engine.generate(make_request(stop_token_ids=(900,))))
        with pytest.raises(AdapterError, match="unknown-key"):
            await anext(engine.generate(make_request(adapter="unknown-key")))
        assert await text_of(engine.generate(make_request())) == "bcdefghi"

    with running() as engine:
        wait_for(main(engine))


def test_what_becomes_of_adapter_images_is_told_in_order() -> None:
    owner = Owner()

    async def main(engine: AsyncEngine) -> None:
        for key in ("k1", "k2", "k3"):
            assert await text_of(engine.generate(make_request(adapter=key), make_image(key))) == "cegikmoq"
        await until_async(lambda: owner.dropped == ["k1", "k2"], "k1 and k2 to be let go")
        for key in ("k1", "k2"):
            told = [what for what, of in owner.events if of == key]
            assert told == ["offered", "held", "answered", "dropped"]

    with running(max_resident_adapters=1, image_owner=owner) as engine:
        wait_for(main(engine))
    assert owner.is_over.is_set()
