"""Rows of the disk tier's images as the index has them."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from typing import Any

from adapter_store.names.catalog import ImageKey

_MARK = b"N"  # no packed manifest begins with it
_MAX_FRONT = 1 << 16  # bytes in front of a manifest
IMAGE_COLUMNS = (
    "version, spec_digest, object, num_bytes, rank, cost_s, uses, "
    f"CASE WHEN substr(manifest, 1, 1) = x'{_MARK.hex()}' THEN substr(manifest, 1, {_MAX_FRONT}) END"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRow:
    """An image of the disk tier. `object` is the sha256 of its bytes, `cost_s` what it took to fetch it, `notices`
    those of its manifest.
    """

    key: ImageKey
    object: str
    num_bytes: int
    rank: int
    cost_s: float
    uses: int
    notices: tuple[str, ...] = ()


def image_row(row: tuple[Any, ...]) -> ImageRow:
    """Of IMAGE_COLUMNS, whatever stands behind them."""
    version, spec_digest, digest, num_bytes, rank, cost_s, uses, front = row[:8]
    key = ImageKey(version, spec_digest)
    notices = _split(front or b"")[0]
    return ImageRow(
        key=key, object=digest, num_bytes=num_bytes, rank=rank, cost_s=cost_s, uses=uses, notices=notices
    )  # fmt: skip


def packed_manifest(manifest: dict[str, Any], notices: tuple[str, ...]) -> bytes:
    """As it is written: notices stand in front, so that taking stock reads them without unpacking it."""
    packed = zlib.compress(json.dumps(manifest).encode())
    front = json.dumps(notices).encode()
    if not notices or len(front) > _MAX_FRONT - 5:
        return packed
    return _MARK + len(front).to_bytes(4, "big") + front + packed


def unpacked(written: bytes) -> dict[str, Any]:
    """The manifest. Raises: ValueError, TypeError, zlib.error when it is not as it was written."""
    manifest: dict[str, Any] = json.loads(zlib.decompress(_split(written)[1]))
    return manifest


def _split(manifest: bytes) -> tuple[tuple[str, ...], bytes]:
    """The notices, and the packed manifest. Rows of earlier programs have no mark: theirs are not known."""
    if manifest[:1] != _MARK:
        return (), manifest
    end = 5 + int.from_bytes(manifest[1:5], "big")
    try:
        notices = tuple(map(str, json.loads(manifest[5:end])))
    except (ValueError, TypeError):  # broken, which whoever unpacks the manifest finds out
        notices = ()
    return notices, manifest[end:]
