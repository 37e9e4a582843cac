"""The image specs that adapters are packed for: those that somebody serves now, and for how long."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from adapter_store.errors import SpecUnknown
from adapter_store.image.spec import Spec

MAX_DORMANT = 32  # specs that nobody serves are known still, so that whoever comes back need not tell them again


class Specs:
    """A spec is live as long as an owner (a replica) has named it within `ttl_s`: by its registration, a heartbeat, a
    lease. What is brought, pinned or warmed for "all" is so for the live ones: a base model that was changed, or
    another dtype of adapters, is forgotten with the last replica that served it.

    `on_dormant` is told of a spec that has just ceased to be live. Not a thread's.
    """

    def __init__(self, ttl_s: float, clock: Callable[[], float], on_dormant: Callable[[str], None]) -> None:
        self._ttl_s, self._clock, self._on_dormant = ttl_s, clock, on_dormant
        self._specs: OrderedDict[str, Spec] = OrderedDict()  # the one named last is last
        self._named: dict[str, dict[str, float]] = {}  # live ones: by owner, until when

    def __len__(self) -> int:
        return len(self._named)

    def add(self, spec: Spec, owner: str) -> bool:
        """Makes `spec` known and live; whether it was not live before."""
        self._expire()
        is_new = spec.digest not in self._named
        self._specs.setdefault(spec.digest, spec)
        self.named(spec.digest, owner)
        return is_new

    def named(self, digest: str, owner: str) -> Spec:
        """The spec, which `owner` has named now. Raises: SpecUnknown."""
        if digest not in self._specs:
            raise SpecUnknown(digest)
        self._named.setdefault(digest, {})[owner] = self._clock() + self._ttl_s
        self._specs.move_to_end(digest)
        return self._specs[digest]

    def beat(self, owner: str) -> None:
        """`owner` is there still, and serves what it has served."""
        self._expire()
        until = self._clock() + self._ttl_s
        for owners in self._named.values():
            if owner in owners:
                owners[owner] = until

    def live(self) -> tuple[Spec, ...]:
        """The specs that somebody serves, in the order in which they became live."""
        self._expire()
        return tuple(self._specs[digest] for digest in self._named)

    def digests(self) -> tuple[str, ...]:
        """Of the live specs."""
        return tuple(spec.digest for spec in self.live())

    def _expire(self) -> None:
        now = self._clock()
        for digest, owners in list(self._named.items()):
            for owner in [owner for owner, until in owners.items() if until <= now]:
                del owners[owner]
            if not owners:
                del self._named[digest]
                self._on_dormant(digest)
        dormant = [digest for digest in self._specs if digest not in self._named]
        for digest in dormant[: max(0, len(dormant) - MAX_DORMANT)]:
            del self._specs[digest]
