"""Adapters that a replica brings in before anybody asks for them: those it keeps, and those it had better begin with.

Requests go first: one adapter at a time, and what does not fit beside what runs is left out.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Protocol

from adapter_store.errors import StoreError
from adapter_store.records import AdapterRecord
from deployments.calls import Refused
from deployments.replica.held import Held, HeldAdapters
from engine.errors import AdapterError, EngineError
from engine.lora.image import AdapterImage
from engine.stats import EngineStats

logger = logging.getLogger("ray.serve")

POLL_S = 0.02
LOAD_WAIT_S = 30.0  # a busy device gets an adapter within; what takes longer counts as having no room
_FAULTS = (StoreError, EngineError, Refused)  # that need no traceback


class Device(Protocol):
    """The engine, as far as adapters without a request go."""

    async def preload(self, image: AdapterImage) -> None:
        """Begins to load `image` where nobody else has to go for it; else the engine drops it."""
        ...

    def pin_adapter(self, key: str) -> None:
        """Keeps a resident version until `unpin_adapter`. May wait for a step. Raises: AdapterError."""
        ...

    def unpin_adapter(self, key: str) -> None: ...

    def stats(self) -> EngineStats: ...


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
        load_wait_s: float = LOAD_WAIT_S,
    ) -> None:
        self._adapters = adapters
        self._device = device
        self._store = store
        self._names = pinned
        self._budget_bytes = budget_bytes
        self._refresh_s = refresh_s
        self._load_wait_s = load_wait_s
        self._pinned: dict[str, str] = {}  # name -> version
        self._told: dict[str, str] = {}  # name -> why it could not be pinned at the last look

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
                self._told.pop(name, None)
            except Exception as error:
                if self._told.get(name) != str(error):  # once, not with every look
                    _warn(f"adapter {name!r} cannot be pinned on this replica, which goes on", error)
                self._told[name] = str(error)

    async def _pin(self, name: str) -> None:
        """Raises: AdapterError when it does not fit; what `HeldAdapters.borrowed` does."""
        before = self._pinned.get(name)
        async with self._adapters.borrowed(name, None, None) as held:
            if held.version == before:
                return
            if not await self._load(held):
                raise AdapterError(
                    "no room beside what the device has; raise engine.adapter_bytes or kv_cache_bytes, or pin fewer"
                )
            await asyncio.to_thread(self._device.pin_adapter, held.version)
            self._pinned[name] = held.version
        if before is not None:
            self._device.unpin_adapter(before)

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
        """Whether the device has it now. What comes later than is waited for stays held until the engine drops it."""
        await self._device.preload(held.image)
        deadline = time.monotonic() + self._load_wait_s
        while held.version not in self._device.stats().resident_adapters:
            is_refused = not held.offers and not held.in_engine
            if is_refused or time.monotonic() > deadline:
                return False
            await asyncio.sleep(POLL_S)
        return True


def _warn(what: str, error: Exception) -> None:
    logger.warning("%s: %s: %s", what, type(error).__name__, error, exc_info=not isinstance(error, _FAULTS))
