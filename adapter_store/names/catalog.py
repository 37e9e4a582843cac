"""What the store knows: names, the versions they stand for, the state of each image, and who holds it.

A pure state machine: no I/O, no clock (`now` is passed in, in seconds of any monotonic clock), no asyncio. An image is
keyed by (version, spec digest). A name moves from one version to the next in one assignment; a version that somebody
leases is never forgotten.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from typing import NamedTuple

from adapter_store.errors import StoreError
from adapter_store.records import TRANSITIONS, AdapterState, version_digest
from adapter_store.sources.base import SourceListing


class NameKey(NamedTuple):
    """A name within a source."""

    source: str
    name: str


class ImageKey(NamedTuple):
    """An image: one version of an adapter, packed for one spec."""

    version: str
    spec_digest: str


@dataclass(frozen=True, slots=True)
class Version:
    """One content of one name, and the listing it is read by."""

    digest: str
    key: NameKey
    listing: SourceListing


@dataclass(slots=True)
class _Name:
    version: str | None  # None: it was looked for and is not there
    checked_at: float
    is_final: bool  # not there, and no other source may be asked


class _Lease(NamedTuple):
    expires_at: float
    number: int


@dataclass(slots=True)
class _Image:
    state: AdapterState = AdapterState.COLD
    error: StoreError | None = None
    retry_at: float = 0.0
    leases: dict[str, _Lease] = field(default_factory=dict)  # by owner


class Catalog:
    """Names, versions, states and leases.

    `max_missing` bounds what is remembered of names that are not there, `max_names` of all: the half that was looked
    for longest ago is forgotten, but for names with an image.
    """

    def __init__(self, max_missing: int = 10_000, max_names: int = 50_000) -> None:
        self._names: dict[NameKey, _Name] = {}
        self._versions: dict[str, Version] = {}
        self._images: dict[ImageKey, _Image] = {}
        self._images_of: dict[str, set[ImageKey]] = {}  # by version
        self._leased: set[ImageKey] = set()  # images with leases, so that expiry looks at no others
        self._next_expiry = float("inf")  # no lease expires before
        self._max_missing = max_missing
        self._max_names = max_names
        self._num_missing = 0

    # Names

    def observe(self, key: NameKey, listing: SourceListing | None, now: float, *, is_final: bool = False) -> str | None:
        """A source said what `key` is now: moves the name to that version (None: it is not there) and returns it.

        `is_final`: nobody else may say what the name stands for.
        """
        version = None
        if listing is not None:
            version = version_digest(key.source, key.name, listing.etags)
            # The digest is of the ETags alone: a listing that was damaged, or has other (signed) URLs, is replaced.
            self._versions[version] = Version(version, key, listing)
        before = self._names.pop(key, None)
        self._num_missing += (version is None) - (before is not None and before.version is None)
        self._names[key] = _Name(version, now, is_final)
        if before is not None and before.version not in (None, version):
            self._forget_if_unused(str(before.version))
        if self._num_missing > self._max_missing:
            self._forget_missing()
        if len(self._names) > self._max_names:
            self._forget_oldest()
        return version

    def checked_at(self, key: NameKey) -> float | None:
        """When `key` was last known to be true; None: never."""
        name = self._names.get(key)
        return None if name is None else name.checked_at

    def postpone(self, key: NameKey, checked_at: float) -> None:
        """The source could not be asked: what is known of `key` counts as checked at `checked_at`."""
        self._names[key].checked_at = checked_at
        self._names[key] = self._names.pop(key)  # it is in use: forgotten late

    def current(self, key: NameKey) -> str | None:
        """The version `key` stands for; None: it is not there, or was never looked for."""
        name = self._names.get(key)
        return None if name is None else name.version

    def is_final(self, key: NameKey) -> bool:
        """Whether `key` was said to be not there in a way that ends the search for the name."""
        name = self._names.get(key)
        return name is not None and name.is_final

    def forget_name(self, key: NameKey) -> None:
        """The next question about `key` goes to its source; its version stays known until that is answered."""
        name = self._names.get(key)
        if name is not None:
            name.checked_at = float("-inf")

    def drop_name(self, key: NameKey) -> None:
        """Nothing is known of `key` any more, which stands for no version."""
        name = self._names.pop(key, None)
        if name is not None:
            if name.version is not None:
                raise ValueError(f"{key} stands for version {name.version}")
            self._num_missing -= 1

    def version(self, digest: str) -> Version | None:
        """A known version."""
        return self._versions.get(digest)

    # States

    def state(self, image: ImageKey) -> AdapterState:
        """Where `image` is; COLD when nothing is known of it."""
        known = self._images.get(image)
        return AdapterState.COLD if known is None else known.state

    def states_of(self, digest: str) -> list[tuple[ImageKey, AdapterState]]:
        """The images of one version."""
        return [(key, self._images[key].state) for key in sorted(self._images_of.get(digest, ()))]

    def start_fetch(self, image: ImageKey) -> None:
        """COLD or FAILED -> FETCHING."""
        self._move(image, AdapterState.FETCHING)

    def fetched(self, image: ImageKey) -> None:
        """FETCHING -> HOST."""
        self._move(image, AdapterState.HOST)

    def fetch_failed(self, image: ImageKey, error: StoreError, retry_at: float) -> None:
        """FETCHING -> FAILED, remembered until `retry_at`."""
        self._move(image, AdapterState.FAILED)
        # A copy: an error that was raised holds on to all that its callers had in hand, the adapter's bytes as well.
        self._images[image].error, self._images[image].retry_at = copy(error), retry_at
        self._forget_if_unused(image.version)

    def fetch_dropped(self, image: ImageKey) -> None:
        """FETCHING -> COLD: it ended with nothing to remember."""
        self._cool(image)

    def failure(self, image: ImageKey, now: float) -> StoreError | None:
        """The remembered failure of `image`, until its time is over."""
        known = self._images.get(image)
        if known is None or known.state is not AdapterState.FAILED:
            return None
        return copy(known.error) if now < known.retry_at else None  # which the caller may raise

    def failures(self, digest: str) -> tuple[StoreError, ...]:
        """What stood in the way of the images of a version at the last try."""
        return tuple(error for key, _ in self.states_of(digest) if (error := self._images[key].error) is not None)

    def forgive(self, digest: str) -> None:
        """Remembered failures of a version no longer stand in the way of the next try."""
        for key, _ in self.states_of(digest):
            self._images[key].retry_at = float("-inf")

    def evict(self, image: ImageKey) -> None:
        """HOST -> COLD: its blob is dropped. A leased image is never evicted."""
        if self._images[image].leases:
            raise ValueError(f"{image} is leased")
        self._cool(image)

    def lose(self, image: ImageKey) -> None:
        """HOST -> COLD: its blob is gone, so whatever was leased of it is gone too."""
        self._images[image].leases.clear()
        self._leased.discard(image)
        self._cool(image)

    # Leases

    def lease(self, image: ImageKey, owner: str, expires_at: float, number: int = 0) -> None:
        """`owner` holds `image`; asking again renews, so that a repeated call costs nothing, and gives a new number."""
        known = self._images[image]
        if known.state is not AdapterState.HOST:
            raise ValueError(f"{image} is {known.state}, only an image on the host is leased")
        known.leases[owner] = _Lease(expires_at, number)
        self._leased.add(image)
        self._next_expiry = min(self._next_expiry, expires_at)

    def renew(self, digest: str, owner: str, expires_at: float) -> bool:
        """Renews the leases of `owner` on all images of a version; False when it has none."""
        held = [key for key, _ in self.states_of(digest) if owner in self._images[key].leases]
        for key in held:
            leases = self._images[key].leases
            leases[owner] = leases[owner]._replace(expires_at=expires_at)
            self._next_expiry = min(self._next_expiry, expires_at)
        return bool(held)

    def release(self, digest: str, owner: str, number: int | None = None) -> tuple[ImageKey, ...]:
        """Ends the leases of `owner` on a version; returns the images that nobody wants any more, to be evicted.

        `number` ends that lease only: a call that comes late must not end the lease that was taken after it.
        """
        for key, _ in self.states_of(digest):
            held = self._images[key].leases.get(owner)
            if held is not None and number in (None, held.number):
                self._unlease(key, owner)
        return self.unwanted(digest)

    def expire(self, now: float) -> tuple[ImageKey, ...]:
        """Ends all leases whose time is over; returns the images that nobody wants any more, to be evicted."""
        if now < self._next_expiry:
            return ()
        over = [
            (key, owner)
            for key in self._leased
            for owner, held in self._images[key].leases.items()
            if held.expires_at <= now
        ]
        for key, owner in over:
            self._unlease(key, owner)
        left = (held.expires_at for key in self._leased for held in self._images[key].leases.values())
        self._next_expiry = min(left, default=float("inf"))
        return tuple(key for digest in sorted({key.version for key, _ in over}) for key in self.unwanted(digest))

    def unwanted(self, digest: str) -> tuple[ImageKey, ...]:
        """The images on the host of a version that its name no longer stands for, as far as nobody leases them."""
        version = self._versions.get(digest)
        if version is None or self.current(version.key) == digest:
            return ()
        states = self.states_of(digest)
        return tuple(key for key, state in states if state is AdapterState.HOST and not self._images[key].leases)

    def is_leased(self, image: ImageKey) -> bool:
        """Whether anybody holds `image`."""
        known = self._images.get(image)
        return known is not None and bool(known.leases)

    def forget_spec(self, spec_digest: str) -> tuple[ImageKey, ...]:
        """Nobody serves a spec any more: forgets its failures, returns its images that may be evicted."""
        of_it = [key for key in self._images if key.spec_digest == spec_digest]
        for key in of_it:
            if self._images[key].state is AdapterState.FAILED:
                self._delete(key)
                self._forget_if_unused(key.version)
        there = (key for key in of_it if self.state(key) is AdapterState.HOST)
        return tuple(key for key in there if not self._images[key].leases)

    def count(self, state: AdapterState) -> int:
        """How many images are in `state`."""
        return sum(image.state is state for image in self._images.values())

    @property
    def num_leases(self) -> int:
        """How many leases are held, over all owners and images."""
        return sum(len(self._images[key].leases) for key in self._leased)

    def check_invariants(self) -> None:
        """Raises: AssertionError when what is known contradicts itself."""
        for name in self._names.values():
            assert name.version is None or name.version in self._versions, "a name stands for a forgotten version"
        for key, image in self._images.items():
            assert key.version in self._versions, "an image of a forgotten version"
            assert not image.leases or image.state is AdapterState.HOST, "a lease on an image that is not on the host"
            assert (image.error is not None) == (image.state is AdapterState.FAILED), "a failure without its reason"
        expiries = [held.expires_at for image in self._images.values() for held in image.leases.values()]
        assert self._next_expiry <= min(expiries, default=float("inf")), "a lease would never expire"
        assert self._leased == {key for key, image in self._images.items() if image.leases}, "leased images miscounted"
        indexed = {key for keys in self._images_of.values() for key in keys}
        assert indexed == set(self._images), "the index by version differs from the images"
        assert self._num_missing == sum(name.version is None for name in self._names.values()), (
            "missing names miscounted"
        )

    # Inside

    def _move(self, key: ImageKey, state: AdapterState) -> None:
        image = self._images.get(key, _Image())
        if state not in TRANSITIONS[image.state]:
            raise ValueError(f"{key}: {image.state} -> {state} is no transition")
        image.state, image.error = state, None
        self._images[key] = image
        self._images_of.setdefault(key.version, set()).add(key)

    def _cool(self, key: ImageKey) -> None:
        self._move(key, AdapterState.COLD)
        self._delete(key)  # COLD is what an unknown image is
        self._forget_if_unused(key.version)

    def _delete(self, key: ImageKey) -> None:
        del self._images[key]
        siblings = self._images_of[key.version]
        siblings.discard(key)
        if not siblings:
            del self._images_of[key.version]

    def _unlease(self, key: ImageKey, owner: str) -> None:
        leases = self._images[key].leases
        leases.pop(owner, None)
        if not leases:
            self._leased.discard(key)

    def _forget_if_unused(self, digest: str) -> None:
        version = self._versions.get(digest)
        if version is None or self.current(version.key) == digest:
            return
        for key, state in self.states_of(digest):
            if state is AdapterState.FAILED:
                self._delete(key)
        if digest not in self._images_of:
            del self._versions[digest]

    def _forget_missing(self) -> None:
        for key in [key for key, name in self._names.items() if name.version is None][: self._max_missing // 2]:
            del self._names[key]
            self._num_missing -= 1

    def _forget_oldest(self) -> None:
        for key, name in list(self._names.items())[: self._max_names // 2]:
            if name.version is not None and name.version in self._images_of:
                continue
            del self._names[key]
            self._num_missing -= name.version is None
            if name.version is not None:
                self._forget_if_unused(name.version)
