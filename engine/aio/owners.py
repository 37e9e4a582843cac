"""Who keeps the bytes of adapter images, and what the engine tells of them, in one order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class AdapterNews:
    """What became of images. `changes` come before `answered`, and news in the order in which they are told."""

    changes: tuple[tuple[str, bool], ...] = ()  # (adapter version, whether the engine holds its image from then on)
    answered: tuple[str, ...] = ()  # versions, one for each offer: the engine has looked at it
    is_over: bool = False  # the engine has ended: it holds nothing, and no offer is answered any more


class ImageOwner(Protocol):
    """Keeps an image's bytes from each `offered` to its answer, and while the engine holds it.

    Whether the engine holds an image is known from what it tells, never from what a stream of answers shows: a stream
    may be read long after the engine has dropped the image again.
    """

    def offered(self, key: str) -> None:
        """An image goes to the engine. In the thread of whoever asks, before the engine can see it."""

    def told(self, news: AdapterNews) -> None:
        """From a thread of the engine."""
