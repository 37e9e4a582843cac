"""What a server answered to a request for a range. Pure: servers differ, so nothing of an answer is taken on trust."""

from __future__ import annotations

import re

from adapter_store.sources.base import RangeRead, SourceChanged, SourceFile

_CONTENT_RANGE = re.compile(r"bytes\s+(?:(\d+)-(\d+)|\*)/(\d+|\*)", re.IGNORECASE)
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


class WrongRange(Exception):
    """The answer is another range than the one asked for: the server's fault, not a change of the file."""


def range_header(part: RangeRead) -> str:
    """The Range that asks for what `part` still misses."""
    return f"bytes={part.start + part.num_received}-{part.end - 1}"


def num_bytes_to_skip(file: SourceFile, part: RangeRead, content_range: str | None, content_length: int | None) -> int:
    """Bytes of the body before the first one that `part` misses.

    The status does not tell: some servers (rclone) send ranges as 200. A Content-Range says what the body is; without
    one it is the whole file (a server, or a proxy before it, that knows no ranges).

    Raises: SourceChanged when the sizes are not the listed file's; WrongRange.
    """
    first = part.start + part.num_received
    if content_range is None:
        if content_length is not None and content_length != file.num_bytes:
            raise SourceChanged(f"{file.name} has {content_length} bytes, {file.num_bytes} were listed")
        return first
    begin, end, total = parse_content_range(content_range)
    if total is not None and total != file.num_bytes:
        raise SourceChanged(f"{file.name} has {total} bytes, {file.num_bytes} were listed")
    if (begin, end) != (first, part.end) or content_length not in (None, part.num_missing):
        raise WrongRange(
            f"asked for {range_header(part)} of {file.name}, answered with {content_range!r} and "
            f"{'no' if content_length is None else content_length} bytes"
        )
    return 0


def parse_content_range(text: str) -> tuple[int | None, int | None, int | None]:
    """(first byte, behind the last byte, bytes of the whole file) of a Content-Range; None what it does not tell.

    Raises: WrongRange when it is none.
    """
    match = _CONTENT_RANGE.fullmatch(text.strip())
    if match is None:
        raise WrongRange(f"{text!r} is no range of bytes")
    first, last, total = match.groups()
    return (
        None if first is None else int(first),
        None if last is None else int(last) + 1,
        None if total == "*" else int(total),
    )


def digest_or_none(text: str | None) -> str | None:
    """`text` as a sha256 in lower-case hex, if it is one: metadata of that name may hold another notation."""
    return text.lower() if text is not None and _SHA256.fullmatch(text) else None
