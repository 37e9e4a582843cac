"""Asks a source what an adapter is now, within a time, and tells every failure in the same way."""

from __future__ import annotations

import asyncio
import logging

from adapter_store.errors import SourceUnavailable, StoreError
from adapter_store.names.catalog import NameKey
from adapter_store.names.desk import Desk, Urgency
from adapter_store.sources.base import Source, SourceListing

_log = logging.getLogger(__name__)


async def ask(source: Source, name: str, timeout_s: float) -> SourceListing | None:
    """`source.stat(name)`, with at most `timeout_s` (the setting `stat_timeout_s`).

    Raises: SourceUnavailable that names the adapter, whatever went wrong.
    """
    try:
        return await asyncio.wait_for(source.stat(name), timeout_s)
    except TimeoutError as error:
        raise _unavailable(source, name, f"no answer within stat_timeout_s={timeout_s:g}") from error
    except SourceUnavailable as error:
        raise _unavailable(source, name, error.reason) from error
    except StoreError:
        raise
    except Exception as error:
        raise _unavailable(source, name, unreadable(error)) from error


async def ask_in_turn(
    source: Source, desk: Desk, key: NameKey, urgency: Urgency, timeout_s: float
) -> SourceListing | None:
    """`ask`, when its turn comes; that, too, within `timeout_s`. Raises: SourceUnavailable."""
    try:
        async with asyncio.timeout(timeout_s) as waiting, desk.turn(key, urgency):
            waiting.reschedule(None)
            return await ask(source, key.name, timeout_s)
    except TimeoutError as error:
        raise desk.refusal() from error


def unreadable(error: Exception) -> str:
    """The reason for a failure that a source did not expect: a damaged answer makes parsers raise anything."""
    _log.warning("an answer of a source cannot be read", exc_info=error)
    return f"its answer cannot be read ({type(error).__name__}: {error})"


def _unavailable(source: Source, name: str, reason: str) -> SourceUnavailable:
    return SourceUnavailable(source.name, f"adapter {name!r}: {reason}")
