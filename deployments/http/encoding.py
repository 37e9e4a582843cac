"""A body's bytes as UTF-8: unpacked, in a charset that JSON has, without a byte order mark.

JSON is UTF-8 between strangers; UTF-16 and UTF-32 are told by its first bytes, as other servers in Python do.
"""

from __future__ import annotations

import codecs
import json
import zlib

from starlette.exceptions import HTTPException

from deployments.calls import Fault, Refused

_WBITS = {"gzip": (31,), "x-gzip": (31,), "deflate": (15, -15)}  # deflate also without zlib's frame, as some write it
ACCEPTED = "gzip, deflate"
_CHARSETS = frozenset({"ascii", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le",
                       "utf-32-be"})  # fmt: skip


def coding_of(content_encoding: str | None) -> str:
    """How a body is packed, "" for not at all. Raises: HTTPException (415, which says what may be sent instead)."""
    codings = [name for part in (content_encoding or "").lower().split(",") if (name := part.strip())]
    codings = [name for name in codings if name != "identity"]
    if not codings:
        return ""
    if len(codings) > 1 or codings[0] not in _WBITS:
        given = ", ".join(codings)[:100]
        message = f"content-encoding {given!r} is not read; send the body as it is, or packed once by gzip or deflate"
        raise HTTPException(415, message, headers={"Accept-Encoding": ACCEPTED})
    return codings[0]


def check_charset(charset: str | None) -> None:
    """Raises: Refused for a charset that JSON is not written in."""
    try:
        known = charset is None or codecs.lookup(charset).name in _CHARSETS
    except (LookupError, ValueError):  # not a name, or not one of a codec
        known = False
    if not known:
        message = f"charset {charset!r:.100}: JSON is not written in it; send UTF-8"
        raise Refused(Fault(code="unsupported_media_type", message=message))


def unpacked(packed: bytes, coding: str, max_bytes: int) -> bytes:
    """What `packed` holds; of one that holds too much, no more is unpacked than `max_bytes` and one.

    Raises: HTTPException (413), Refused when the bytes are not what `coding` says.
    """
    if not coding:
        return packed
    for wbits in _WBITS[coding]:
        reader = zlib.decompressobj(wbits)
        try:
            text = reader.decompress(packed, max_bytes + 1)
        except zlib.error:
            continue
        if len(text) > max_bytes:
            raise HTTPException(413, f"the body unpacks to more than the limit of {max_bytes} bytes; send less")
        if reader.eof and not reader.unused_data:
            return text
        # What is cut or followed by more is neither of the two forms.
    what = f"content-encoding {coding!r}: the body is not that, or does not end where it should; pack it again"
    raise Refused(Fault(code="invalid_request", message=what))


def as_utf8(text: bytes) -> bytes:
    """A JSON text without its byte order mark, from UTF-8, UTF-16 or UTF-32. Raises: Refused."""
    encoding = json.detect_encoding(text[:4])
    if encoding == "utf-8":
        return text
    if encoding == "utf-8-sig":
        return text[len(codecs.BOM_UTF8) :]
    try:
        return text.decode(encoding).encode()
    except UnicodeError as error:
        message = f"the body begins as {encoding.upper()} and is not: {str(error)[:100]}; send UTF-8"
        raise Refused(Fault(code="invalid_request", message=message)) from error
