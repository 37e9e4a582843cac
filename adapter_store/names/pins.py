"""Which adapters an operator wants to stay, and which of their images do: together at most half of the host budget.

Pure: no I/O.
"""

from __future__ import annotations

from adapter_store.errors import PinRefused
from adapter_store.names.catalog import ImageKey, NameKey


class Pins:
    """Pinned names, and the bytes of their images that are kept. A new version may be too large to be kept."""

    def __init__(self, host_bytes: int) -> None:
        self.limit_bytes = host_bytes // 2
        self.names: set[NameKey] = set()
        self._images: dict[ImageKey, tuple[NameKey, int]] = {}

    @property
    def used_bytes(self) -> int:
        """Of the images that are kept."""
        return sum(num_bytes for _, num_bytes in self._images.values())

    def keeps(self, image: ImageKey) -> bool:
        """Whether an image must stay."""
        return image in self._images

    def add(self, name: NameKey, images: dict[ImageKey, int]) -> None:
        """Pins a name with the images (and their bytes) it has now. Raises: PinRefused, having changed nothing."""
        num_bytes = sum(size for image, size in images.items() if image not in self._images)
        if self.used_bytes + num_bytes > self.limit_bytes:
            raise PinRefused(name.name, num_bytes, self.used_bytes, self.limit_bytes)
        self.names.add(name)
        self._images.update({image: (name, size) for image, size in images.items()})

    def keep(self, name: NameKey, image: ImageKey, num_bytes: int) -> bool:
        """An image of `name` has come to the host: whether it stays."""
        if name not in self.names:
            return False
        if image not in self._images:
            if self.used_bytes + num_bytes > self.limit_bytes:
                return False
            self._images[image] = (name, num_bytes)
        return True

    def drop_version(self, version: str) -> None:
        """A version that its name no longer stands for is not kept."""
        self._images = {image: entry for image, entry in self._images.items() if image.version != version}

    def drop_spec(self, spec_digest: str) -> None:
        """A spec that nobody serves any more has no images to be kept."""
        self._images = {image: entry for image, entry in self._images.items() if image.spec_digest != spec_digest}

    def remove(self, name: NameKey) -> None:
        """Unpins a name."""
        self.names.discard(name)
        self._images = {image: entry for image, entry in self._images.items() if entry[0] != name}
