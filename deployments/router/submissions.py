"""Calls on their way to replicas. What is aimed at one replica in the same moment goes there as one.

While a batch is on its way to a replica, what comes for it waits for the answer, but no longer than `MAX_WAIT_S`: the
busier a router is, the fewer calls of Serve's it makes, and the more prompts a replica has for its next step.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import Counter
from collections.abc import Callable
from typing import Any

from deployments.calls import Batch, Receipt, Submission

MAX_WAIT_S = 0.005
MAX_BATCH = 64


class Ticket:
    """One submission's: `receipt` has what the replica says, or the exception that its batch has ended with."""

    __slots__ = ("is_left", "journey", "receipt", "submission")

    def __init__(self, submission: Submission) -> None:
        self.submission = submission
        self.receipt: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        self.is_left = False  # nobody waits for it any more
        self.journey: _Journey | None = None  # None: it has not left yet


class _Journey:
    """One batch under way."""

    def __init__(self, tickets: list[Ticket], response: Any) -> None:
        self.tickets = tickets
        self.response = response
        for ticket in tickets:
            ticket.journey = self


class Submissions:
    """Of one router, on one event loop. `cancel(replica, number)` tells a replica that a call has no caller."""

    def __init__(self, handle: Any, cancel: Callable[[str, int], None]) -> None:
        self._handle = handle
        self._cancel = cancel
        self._waiting: dict[str, list[Ticket]] = {}  # by the replica they are aimed at
        self._timers: dict[str, asyncio.Handle] = {}
        self._under_way: Counter[str] = Counter()

    def send(self, submission: Submission) -> Ticket:
        """Sends it soon."""
        ticket = Ticket(submission)
        where = submission.aim[0] if submission.aim else ""
        waiting = self._waiting.setdefault(where, [])
        waiting.append(ticket)
        loop = asyncio.get_running_loop()
        if len(waiting) >= MAX_BATCH:
            self._leave(where)
        elif where not in self._timers:
            if self._under_way[where]:
                self._timers[where] = loop.call_later(MAX_WAIT_S, self._leave, where)
            else:  # with all that comes in this turn of the loop
                self._timers[where] = loop.call_soon(self._leave, where)
        return ticket

    def take_back(self, ticket: Ticket) -> None:
        """Nobody waits for its receipt: if a replica takes the call all the same, it is told."""
        ticket.is_left = True
        if ticket.journey is not None and all(each.is_left for each in ticket.journey.tickets):
            ticket.journey.response.cancel()

    def _leave(self, where: str) -> None:
        if (timer := self._timers.pop(where, None)) is not None:
            timer.cancel()
        tickets = [ticket for ticket in self._waiting.pop(where, ()) if not ticket.is_left]
        if not tickets:
            return
        batch = Batch.of([ticket.submission for ticket in tickets])
        # In a context of its own: calls made within one HTTP request would share its internal id, by which Serve tells
        # waiting calls apart, and all but the first would wait for ever.
        response: Any = contextvars.Context().run(self._handle.submit.remote, batch)
        journey = _Journey(tickets, response)
        self._under_way[where] += 1
        asking: asyncio.Future[bytes] = asyncio.ensure_future(response)
        asking.add_done_callback(lambda done: self._arrived(where, journey, done))

    def _arrived(self, where: str, journey: _Journey, done: asyncio.Future[bytes]) -> None:
        self._under_way[where] -= 1
        if not self._under_way[where]:
            del self._under_way[where]
            if where in self._waiting:
                self._leave(where)
        if done.cancelled() or done.exception() is not None:
            for ticket in journey.tickets:
                _fail(ticket.receipt, None if done.cancelled() else done.exception())
            return
        for ticket, receipt in zip(journey.tickets, Receipt.read(done.result()), strict=True):
            if ticket.is_left:
                if receipt.fault is None:
                    self._cancel(receipt.replica, ticket.submission.number)
            elif not ticket.receipt.done():
                ticket.receipt.set_result(receipt)


def _fail(receipt: asyncio.Future[Receipt], error: BaseException | None) -> None:
    if receipt.done():
        return
    if error is None:
        receipt.cancel()
    else:
        receipt.set_exception(error)
        receipt.exception()  # its caller may have left, and nobody else looks at it
