"""How an AsyncEngine ends: drained, closed, or dead, and nobody is left waiting."""

from __future__ import annotations

import asyncio
import threading

import pytest

from engine.aio.async_engine import AsyncEngine
from engine.aio.owners import AdapterNews
from engine.errors import EngineDead, QueueFull
from tests.engine_api.alphabet import AlphabetRunner, make_image, make_request
from tests.engine_api.async_help import Owner, collect, running, text_of, wait_for
from tests.support.waiting import until_async


def test_draining_refuses_new_requests_and_waits_for_the_accepted() -> None:
    async def main(engine: AsyncEngine) -> None:
        runner.gate.clear()
        accepted = asyncio.ensure_future(text_of(engine.generate(make_request())))
        await until_async(lambda: len(runner.plans) == 1, "the first step")
        drain = asyncio.ensure_future(engine.drain())
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="draining"):
            await anext(engine.generate(make_request("late")))
        assert not drain.done()
        runner.gate.set()
        await drain
        assert await accepted == "bcdefghi"

    runner = AlphabetRunner()
    with running(runner) as engine:
        wait_for(main(engine))


def test_a_stream_whose_event_loop_is_gone_holds_up_no_drain() -> None:
    runner = AlphabetRunner()
    runner.gate.clear()
    with running(runner) as engine:
        loop = asyncio.new_event_loop()
        stream = engine.generate(make_request(max_tokens=None))
        reader = loop.create_task(anext(stream))  # type: ignore[arg-type]
        loop.run_until_complete(until_async(lambda: len(runner.plans) == 1, "the first step"))
        loop.close()
        engine._die("as if the device had failed")
        wait_for(engine.drain())
        runner.gate.set()
        del reader, stream


def test_closing_ends_the_threads_and_fails_what_is_left() -> None:
    async def main(engine: AsyncEngine) -> None:
        stream = engine.generate(make_request(max_tokens=None))
        await anext(stream)
        await asyncio.to_thread(engine.close)
        with pytest.raises(EngineDead, match="closed"):
            await collect(stream)
        with pytest.raises(EngineDead, match="closed"):
            await anext(engine.generate(make_request("late")))

    before = set(threading.enumerate())
    with running(max_model_len=100_000, num_blocks=10_000) as engine:
        wait_for(main(engine))
    assert not engine.is_alive
    assert [t.name for t in set(threading.enumerate()) - before if t.name.startswith("chorus-")] == []


def test_a_device_error_reaches_every_waiter_and_is_final() -> None:
    reasons: list[str] = []

    async def main(engine: AsyncEngine) -> None:
        runner.gate.clear()
        waiters = [asyncio.ensure_future(collect(engine.generate(make_request(str(i))))) for i in range(3)]
        await until_async(lambda: len(runner.plans) == 1, "the first step")
        runner.result_error = RuntimeError("device-side assert")
        runner.gate.set()
        results = await asyncio.gather(*waiters, return_exceptions=True)
        assert [type(result) for result in results] == [EngineDead] * 3
        assert "device-side assert" in str(results[0])
        with pytest.raises(EngineDead, match="device-side assert"):
            await anext(engine.generate(make_request("late")))
        await until_async(lambda: reasons, "the death to be told")

    runner = AlphabetRunner()
    with running(runner, on_death=reasons.append) as engine:
        assert engine.is_alive
        wait_for(main(engine))
        assert not engine.is_alive
        assert engine.dead_reason is not None
        with pytest.raises(EngineDead, match="device-side assert"):
            engine.check()
    assert len(reasons) == 1


def test_a_step_that_hangs_is_found_by_the_watchdog() -> None:
    reasons: list[str] = []

    async def main(engine: AsyncEngine) -> None:
        runner.gate.clear()
        with pytest.raises(EngineDead, match=r"step_timeout_s=0\.2"):
            await collect(engine.generate(make_request()))

    runner = AlphabetRunner()
    with running(runner, on_death=reasons.append, step_timeout_s=0.2) as engine:
        wait_for(main(engine))
        assert not engine.is_alive
    assert len(reasons) == 1


def test_an_idle_engine_outlives_the_step_timeout() -> None:
    async def main(engine: AsyncEngine) -> None:
        assert await text_of(engine.generate(make_request())) == "bcdefghi"
        await asyncio.sleep(1.3)
        assert engine.is_alive
        assert await text_of(engine.generate(make_request())) == "bcdefghi"

    with running(step_timeout_s=1.0) as engine:
        wait_for(main(engine))


def test_a_failure_of_the_output_thread_is_a_death_too() -> None:
    class Broken(Owner):
        def told(self, news: AdapterNews) -> None:
            if ("k1", False) in news.changes or news.is_over:
                raise RuntimeError("cannot release k1")

    async def main(engine: AsyncEngine) -> None:
        assert await text_of(engine.generate(make_request(adapter="k1"), make_image("k1"))) == "cegikmoq"
        with pytest.raises(EngineDead):
            await ask_for_ever(engine)
        assert "cannot release k1" in str(engine.dead_reason)

    async def ask_for_ever(engine: AsyncEngine) -> None:
        while True:
            await collect(engine.generate(make_request(adapter="k2"), make_image("k2")))

    with running(max_resident_adapters=1, image_owner=Broken()) as engine:
        wait_for(main(engine))
