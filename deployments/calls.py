"""What passes between a router and a replica: plain frozen data that pickles, standard library only.

A router submits a `Call` and receives `StreamItem`s in frames (`deployments.frames`). Errors travel as data (`Fault`),
so that their stable codes survive the trip; what an exception from Ray means, `deployments.losses` knows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import InvalidRequest
from engine.pooling import Numbers
from engine.request import OutputDelta, SamplingParams

PREFIX_TOKENS = (64, 256, 1024)
"""Prompt lengths, in tokens, at which a hint is taken for cache-aware placement."""

RESERVED_CODE = "replica_reserved"
"""Of a replica that takes no call, or not this one, because one must be served alone."""

STOPPED_CODE = "replica_stopped"
"""Of a replica that ends for a reason that the request has no part in."""

UNREAD_CODE = "answer_unread"
"""Of an answer that was given up as the router that asked for it was not reading."""

MAX_MERGED = 16  # adapters that are merged for one request
MAX_WEIGHT = 1e6  # of one, either way: times any scaling it is a float32 number


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Why a request failed. `code` is stable and decides the HTTP status; `param` names the field, if one is wrong."""

    code: str
    message: str
    param: str | None = None


class Refused(Exception):
    """A request failed with a `Fault` that its caller must be told."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault)
        self.fault = fault

    def __str__(self) -> str:
        return f"{self.fault.code}: {self.fault.message}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One of several adapters that a request is for: what it adds to each layer counts `weight` times."""

    name: str
    source: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Raises: InvalidRequest (`weights`)."""
        if not (math.isfinite(self.weight) and abs(self.weight) <= MAX_WEIGHT):
            limit = f"is not a number from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}"
            raise InvalidRequest("weights", f"{self.weight!r}, of {self.name!r}, {limit}")


def merge_name(parts: Sequence[Part]) -> str:
    """What adapters go by that are served as one: in placement, prefix hints and reports. No adapter is called so."""
    told = repr([(part.name, part.source, float(part.weight)) for part in parts]).encode()
    return f"merge:{hashlib.blake2b(told, digest_size=16).hexdigest()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One prompt for one replica. `adapter` is a name as the caller wrote it; the replica finds its version.

    With `parts` the adapter is what these come to, `adapter` is their `merge_name`, and a version is the versions of
    all, joined by commas.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    adapter: str | None = None
    adapter_source: str | None = None  # name of a source; None: any
    adapter_version: str | None = None  # pinned when a cut-off answer goes on
    parts: tuple[Part, ...] = ()
    tenant: str = ""
    cache_salt: str = ""
    sample_index: int = 0
    resumed_output_token_ids: tuple[int, ...] = ()
    prefix_hints: tuple[int, ...] = ()
    priority: int = 0  # within its tenant
    avoid: tuple[str, ...] = ()  # replicas that just failed this request
    numbers: Numbers | None = None  # what it is answered by in the place of tokens
    alone_tokens: int = 0  # a replica serves nothing else until this call has produced so many


@dataclass(frozen=True, slots=True)
class Aim:
    """Something for one replica and no other, by its id."""

    replica: str


@dataclass(frozen=True, slots=True)
class Submission:
    """A call from a router, whose answer goes into the frames that this router reads, under `number`.

    `aim`: replicas that should have it, best first; empty: any.
    """

    call: Call
    router: str
    number: int
    aim: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a replica says to a submission: `fault` set, it takes no part in it. `load`: calls it has in hand now.

    `reading`: the number of the subscription that the answer goes to; 0: it waits for its router to read.
    """

    replica: str
    load: int
    fault: Fault | None = None
    reading: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamItem:
    """All that a request gained since its last item. `fault` set: it failed, and nothing follows."""

    replica: str
    adapter_version: str | None = None
    deltas: tuple[OutputDelta, ...] = ()
    fault: Fault | None = None


def prefix_hints(
    adapter: str | None, cache_salt: str, token_ids: tuple[int, ...], cache_key: str = ""
) -> tuple[int, ...]:
    """Stable 64-bit digests of (adapter, salt, first k tokens) for each k of `PREFIX_TOKENS` that the prompt reaches.

    Two prompts with equal hints share at least k tokens of prefix cache if they meet on one replica. `cache_key`: what
    the caller says prompts have in common; a digest of it comes first.
    """
    hints = []
    if cache_key:
        told = repr((adapter, cache_salt, cache_key)).encode()
        hints.append(int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "big"))
    for length in PREFIX_TOKENS:
        if len(token_ids) < length:
            break
        key = repr((adapter, cache_salt, token_ids[:length])).encode()
        hints.append(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big"))
    return tuple(hints)
