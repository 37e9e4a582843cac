"""Adapters that a replica brings in before anybody asks for them: those it keeps, and those it had better begin with.

Requests go first: one adapter at a time, and what does not fit beside what runs is left out.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from adapter_store.errors import StoreError
from adapter_store.records import AdapterRecord
from deployments.adapters import Held, HeldAdapters
from deployments.calls import Refused
from engine.errors import EngineError
from engine.lora.image import AdapterImage

logger = logging.getLogger("ray.serve")

_FAULTS = (StoreError, EngineError, Refused)  # that need no traceback


class Device(Protocol):
    """The engine, as far as adapters without a request go."""

    async def preload(self, image: AdapterImage) -> bool:
        """Brings `image` to the device, after what requests need; False: there is no room that nobody uses."""
        ...

    async def pin_adapter(self, key: str) -> None:
        """Keeps a loaded version until `unpin_adapter`. Raises: AdapterError."""
        ...

    async def unpin_adapter(self, key: str) -> None: ...


class WarmSets(Protocol):
    """The adapter store, as far as it knows what is asked for."""

    async def warm_set(self, budget_bytes: int) -> tuple[AdapterRecord, ...]: ...


class Warmer:
    """`pinned` are names to keep on the device, in the version that they mean; `budget_bytes` is for the warm set."""

    def __init__(
        self,
        adapters: HeldAdapters,
        device: Device,
        store: WarmSets,
        *,
        pinned: tuple[str, ...],
        budget_bytes: int,
        refresh_s: float,
    ) -> None:
        self._adapters = adapters
        self._device = device
        self._store = store
        self._names = pinned
        self._budget_bytes = budget_bytes
        self._refresh_s = refresh_s
        self._pinned: dict[str, str] = {}  # name -> version

    @property
    def pinned(self) -> list[str]:
        """The names that are on the device and stay there."""
        return sorted(self._pinned)

    async def run(self) -> None:
        """Pins, warms up, and then follows the pinned names for ever: they may be uploaded again, or come late."""
        await self.pin()
        await self.warm_up()
        while self._names:
            await asyncio.sleep(self._refresh_s)
            await self.pin()

    async def pin(self) -> None:
        """Pins what each name means now. What cannot be is logged by name; what it meant before stays pinned then."""
        for name in self._names:
            try:
                await self._pin(name)
            except Exception as error:
                _warn(f"adapter {name!r} cannot be pinned on this replica, which goes on", error)

    async def _pin(self, name: str) -> None:
        before = self._pinned.get(name)
        async with self._adapters.borrowed(name, None, None) as held:
            if held.version == before:
                return
            if not await self._load(held):
                logger.warning("adapter %r cannot be pinned on this replica: no room on the device", name)
                return
            await self._device.pin_adapter(held.version)
            self._pinned[name] = held.version
        if before is not None:
            await self._device.unpin_adapter(before)

    async def warm_up(self) -> None:
        """Brings in what the store says is asked for, until there is no room."""
        if not self._budget_bytes:
            return
        try:
            records = await self._store.warm_set(self._budget_bytes)
        except Exception as error:
            _warn("this replica begins without adapters", error)
            return
        num_loaded = 0
        for record in records:
            try:
                async with self._adapters.borrowed(record.name, record.source, record.version) as held:
                    if not await self._load(held):
                        break
                num_loaded += 1
            except Exception as error:
                _warn(f"adapter {record.name!r} is not brought in before it is asked for", error)
        logger.info("%d of %d adapters of the warm set were brought in", num_loaded, len(records))

    async def _load(self, held: Held) -> bool:
        """The engine may drop the image as soon as it has it, so it counts as the engine's from the beginning."""
        before, is_loaded = held.in_engine, False
        held.in_engine = True
        try:
            is_loaded = await self._device.preload(held.image)
        finally:
            held.in_engine = before or is_loaded
        return is_loaded


def _warn(what: str, error: Exception) -> None:
    logger.warning("%s: %s: %s", what, type(error).__name__, error, exc_info=not isinstance(error, _FAULTS))
