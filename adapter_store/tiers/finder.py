"""A name and its image: which version is meant, and that version's bytes on the host."""

from __future__ import annotations

from adapter_store.errors import AdapterVersionGone, SourceUnavailable
from adapter_store.image.spec import Spec
from adapter_store.names.catalog import Catalog, ImageKey, Version
from adapter_store.names.resolver import Resolver
from adapter_store.records import AdapterState, StoreConfig
from adapter_store.sources.base import SourceChanged
from adapter_store.tiers.flights import Flights
from adapter_store.tiers.host import Held


class Finder:
    """See `found`."""

    def __init__(self, catalog: Catalog, resolver: Resolver, flights: Flights, config: StoreConfig) -> None:
        self._catalog, self._resolver, self._flights, self._config = catalog, resolver, flights, config

    async def found(self, name: str, spec: Spec, version: str | None, source: str | None) -> tuple[Version, Held]:
        """The version that is asked for and its image on the host. What is returned is there until the next await."""
        for _ in range(self._config.fetch_retries + 1):
            target = await self._target(name, version, spec.digest, source)
            try:
                return target, await self._flights.image(ImageKey(target.digest, spec.digest), target, spec)
            except SourceChanged:
                await self._resolver.resolve(name, source, force=True)
        raise SourceUnavailable(source or "any", f"the files of adapter {name!r} change faster than they can be read")

    async def _target(self, name: str, version: str | None, spec_digest: str, source: str | None) -> Version:
        if version is None:
            return await self._resolver.resolve(name, source)
        known = self._catalog.version(version)
        if known is not None and known.key.name == name and source in (None, known.key.source):
            state = self._catalog.state(ImageKey(version, spec_digest))
            if state in (AdapterState.HOST, AdapterState.FETCHING):
                return known
        current = await self._resolver.resolve(name, source)
        if current.digest != version:
            raise AdapterVersionGone(name, version)
        return current
