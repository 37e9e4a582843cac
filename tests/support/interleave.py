"""Every order in which the threads of an `AsyncEngine`, an event loop and the world may take turns, one after another.

Nothing runs by itself: the engine thread's turn, the output thread's delivery and each callback of the event loop are
steps that a schedule names. A schedule is a list of choices; `explore` walks through all of them, depth first, by
running the scenario again from its beginning for each.
"""

from __future__ import annotations

import asyncio
import asyncio.events
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import Empty
from typing import Any

from engine.aio.async_engine import AsyncEngine

MAX_STEPS = 400  # of one schedule: what takes longer does not end


class SteppedLoop(asyncio.SelectorEventLoop):
    """An event loop that runs one callback when it is told to."""

    @property
    def is_ready(self) -> bool:
        return bool(self._ready)  # type: ignore[attr-defined]

    def step(self) -> None:
        handle = self._ready.popleft()  # type: ignore[attr-defined]
        if not handle._cancelled:
            with running_in(self):
                handle._run()


class running_in:
    """What runs inside believes that `loop` runs it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def __enter__(self) -> None:
        asyncio.events._set_running_loop(self._loop)

    def __exit__(self, *_: object) -> None:
        asyncio.events._set_running_loop(None)


class SteppedEngine(AsyncEngine):
    """Its threads are never started: their work is done in steps."""

    def start(self) -> None:
        with self._condition:
            self._raise_if_gone()

    @property
    def has_turn(self) -> bool:
        return self.is_alive and bool(self._commands or self._engine.has_work)

    def turn(self) -> None:
        """What the engine thread does between two looks at its commands."""
        commands = self._wait_for_work()
        assert commands is not None
        try:
            self._turn(commands)
        except BaseException as error:
            self._die(str(error), error)

    @property
    def has_delivery(self) -> bool:
        return not self._turns.empty()

    def deliver(self) -> None:
        """What the output thread does with one turn; with the last, it ends."""
        try:
            turn = self._turns.get_nowait()
        except Empty:
            raise AssertionError("nothing to deliver") from None
        if turn is not None:
            self._deliver(turn)
            return
        self._turns.put(None)
        self._run_output()
        while not self._turns.empty():
            self._turns.get_nowait()

    def shut(self) -> None:
        """What `close` does without threads to wait for."""
        with self._condition:
            self._closing = True
        self._turns.put(None)
        self._fail_all("the engine was closed")


@dataclass
class World:
    """One scenario under way. `events` are what the world may do, each once and at any time, in their order."""

    loop: SteppedLoop
    engine: SteppedEngine
    events: list[Callable[[], Any]] = field(default_factory=list)
    check: Callable[[], None] = lambda: None  # after each step
    check_end: Callable[[], None] = lambda: None  # when nobody has anything to do any more

    def enabled(self) -> list[Callable[[], Any]]:
        steps: list[Callable[[], Any]] = []
        if self.loop.is_ready:
            steps.append(self.loop.step)
        if self.engine.has_turn:
            steps.append(self.engine.turn)
        if self.engine.has_delivery:
            steps.append(self.engine.deliver)
        if self.events:
            steps.append(self._happen)
        return steps

    def _happen(self) -> None:
        event = self.events.pop(0)
        with running_in(self.loop):
            event()


def explore(make: Callable[[], World], max_preemptions: int) -> Iterator[int]:
    """Runs every schedule with at most `max_preemptions` changes away from somebody who could have gone on; the number
    of schedules so far, after each.

    Without a bound their number grows beyond all use, and what two or three well-placed interruptions do not show is
    rarely shown by more (Musuvathi and Qadeer, Iterative Context Bounding, PLDI 2007).
    """
    prefix: list[int] = []
    number = 0
    while True:
        taken = _run(make(), prefix, max_preemptions)
        number += 1
        yield number
        while taken and taken[-1][0] + 1 >= taken[-1][1]:
            taken.pop()
        if not taken:
            return
        prefix = [choice for choice, _ in taken]
        prefix[-1] += 1


def _run(world: World, prefix: list[int], max_preemptions: int) -> list[tuple[int, int]]:
    """One schedule: (what was chosen, of how many) at each step."""
    taken: list[tuple[int, int]] = []
    last: Any = None
    preemptions = 0
    try:
        while steps := world.enabled():
            assert len(taken) < MAX_STEPS, "the scenario does not end"
            going_on = [step for step in steps if step == last]
            others = [step for step in steps if step != last]
            # Who ran last comes first, so that choice 0 is no change; others cost one if that one could have gone on.
            choices = going_on + (others if not going_on or preemptions < max_preemptions else [])
            choice = prefix[len(taken)] if len(taken) < len(prefix) else 0
            taken.append((choice, len(choices)))
            preemptions += bool(going_on) and choice > 0
            last = choices[choice]
            last()
            world.check()
        world.check_end()
    except BaseException as error:
        error.add_note(f"schedule: {[choice for choice, _ in taken]}")
        raise
    finally:
        world.loop.close()
    return taken
