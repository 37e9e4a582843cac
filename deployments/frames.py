"""What a replica sends a router of all the answers that it streams to it: one frame for a step, as flat bytes.

    frame   version:u8  load:u32  num_items:u32  num_bytes:u32  report (`deployments.reports`)  item*
    item    number:u64  what:u8  replica, [adapter version], [fault: code, message, param]  num_deltas:u32  delta*
    delta   sample:u32  what:u8  cached:u32  num_tokens:u32  token:u32*  text  [finish:u8]  [stop: text or i64]
            [error: code, message]  [logprobs: for each token its id:u32, value:f64, num_top:u32, (id:u32, value:f64)*]
            [queue: f64]  [vector: num_bytes:u32, float32*]
    text    num_bytes:u32  UTF-8, in which lone surrogates may occur

All numbers are little-endian. `what` says which of the parts in brackets follow. A router and a replica may be of two
releases for the time of an upgrade: a frame of another version is refused, and its streams go on elsewhere.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

from deployments.calls import Fault, StreamItem
from engine.request import FinishReason, OutputDelta, OutputError, TokenLogprobs

VERSION = 3

_HEAD = struct.Struct("<BIII")
_ITEM = struct.Struct("<QB")
_DELTA = struct.Struct("<IBII")
_U32 = struct.Struct("<I")
_I64 = struct.Struct("<q")
_F64 = struct.Struct("<d")
_LOGPROB = struct.Struct("<IdI")
_TOP = struct.Struct("<Id")
_REASONS = tuple(FinishReason)
_NUMBERS = {reason: bytes((number,)) for number, reason in enumerate(_REASONS)}

_HAS_VERSION, _HAS_FAULT, _HAS_PARAM = 1, 2, 4
_FINISHED, _STOP_TEXT, _STOP_TOKEN, _ERROR, _LOGPROBS = 1, 2, 4, 8, 16
_VECTOR = 64
_QUEUED = 128


class BadFrame(Exception):
    """Bytes that are no frame, or a frame of another version."""


def write(load: int, items: Iterable[tuple[int, StreamItem]], report: bytes = b"") -> bytes:
    """`load`: requests that the replica has in hand. `items`: what each stream gained, by the number of its call.

    `report`: what else the replica tells of itself, if it is time.
    """
    parts: list[bytes] = [b"", report]
    count = 0
    for number, item in items:
        count += 1
        fault = item.fault
        what = (item.adapter_version is not None) * _HAS_VERSION
        if fault is not None:
            what |= _HAS_FAULT | (fault.param is not None) * _HAS_PARAM
        parts.append(_ITEM.pack(number, what))
        parts.append(_text(item.replica))
        if item.adapter_version is not None:
            parts.append(_text(item.adapter_version))
        if fault is not None:
            parts += (_text(fault.code), _text(fault.message))
            if fault.param is not None:
                parts.append(_text(fault.param))
        parts.append(_U32.pack(len(item.deltas)))
        for delta in item.deltas:
            _write_delta(delta, parts)
    parts[0] = _HEAD.pack(VERSION, load, count, len(report))
    return b"".join(parts)


def read(frame: bytes, request_id: str = "") -> tuple[int, list[tuple[int, StreamItem]]]:
    """The load and the items of `frame`; its deltas are of the request `request_id`. Raises: BadFrame."""
    try:
        version, load, count, num_bytes = _HEAD.unpack_from(frame)
        if version != VERSION:
            raise BadFrame(f"a frame of version {version}; this process reads version {VERSION}")
        reader = _Reader(frame, _HEAD.size + num_bytes, request_id)
        items = [reader.item() for _ in range(count)]
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise BadFrame(f"a frame of {len(frame)} bytes cannot be read: {error}") from error
    if reader.at != len(frame):
        raise BadFrame(f"a frame of {len(frame)} bytes ends at {reader.at}")
    return load, items


def report_of(frame: bytes) -> bytes:
    """The report in a frame that `read` has read; empty: none."""
    return frame[_HEAD.size : _HEAD.size + int(_HEAD.unpack_from(frame)[3])]


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return _U32.pack(len(raw)) + raw


def _write_delta(delta: OutputDelta, parts: list[bytes]) -> None:
    stop, error, logprobs, ids = delta.stop_reason, delta.error, delta.logprobs, delta.token_ids
    what = 0 if delta.finish_reason is None else _FINISHED
    if stop is not None:
        what |= _STOP_TEXT if isinstance(stop, str) else _STOP_TOKEN
    if error is not None:
        what |= _ERROR
    if logprobs is not None:
        what |= _LOGPROBS
    if delta.queue_s:
        what |= _QUEUED
    if delta.vector is not None:
        what |= _VECTOR
    parts.append(_DELTA.pack(delta.sample_index, what, delta.num_cached_tokens, len(ids)))
    parts.append(_U32.pack(ids[0]) if len(ids) == 1 else struct.pack(f"<{len(ids)}I", *ids))
    parts.append(_text(delta.text))
    if not what:
        return
    if delta.finish_reason is not None:
        parts.append(_NUMBERS[delta.finish_reason])
    if stop is not None:
        parts.append(_text(stop) if isinstance(stop, str) else _I64.pack(stop))
    if error is not None:
        parts += (_text(error.code), _text(error.message))
    if logprobs is not None:
        parts.append(_U32.pack(len(logprobs)))
        for chosen in logprobs:
            parts.append(_LOGPROB.pack(chosen.token_id, chosen.logprob, len(chosen.top)))
            parts += (_TOP.pack(*pair) for pair in chosen.top)
    if delta.queue_s:
        parts.append(_F64.pack(delta.queue_s))
    if delta.vector is not None:
        parts += (_U32.pack(len(delta.vector)), delta.vector)


class _Reader:
    """Reads one part after the other. Raises: struct.error, IndexError, UnicodeDecodeError where one is cut off."""

    def __init__(self, frame: bytes, at: int, request_id: str) -> None:
        self._frame = frame
        self._request_id = request_id
        self.at = at

    def item(self) -> tuple[int, StreamItem]:
        number, what = self._take(_ITEM)
        replica = self._text()
        version = self._text() if what & _HAS_VERSION else None
        fault = None
        if what & _HAS_FAULT:
            code, message = self._text(), self._text()
            fault = Fault(code=code, message=message, param=self._text() if what & _HAS_PARAM else None)
        (count,) = self._take(_U32)
        deltas = tuple([self._delta() for _ in range(self._bounded(count, _DELTA.size))])
        return number, StreamItem(replica=replica, adapter_version=version, deltas=deltas, fault=fault)

    def _delta(self) -> OutputDelta:
        sample, what, cached, count = self._take(_DELTA)
        ids = self._many(f"<{self._bounded(count, _U32.size)}I")
        text = self._text()
        if not what:
            return OutputDelta(self._request_id, sample, ids, text, num_cached_tokens=cached)
        reason: FinishReason | None = None
        stop: str | int | None = None
        error: OutputError | None = None
        if what & _FINISHED:
            reason = _REASONS[self._frame[self.at]]
            self.at += 1
        if what & _STOP_TEXT:
            stop = self._text()
        elif what & _STOP_TOKEN:
            (stop,) = self._take(_I64)
        if what & _ERROR:
            error = OutputError(self._text(), self._text())
        logprobs = self._logprobs() if what & _LOGPROBS else None
        queue_s = self._take(_F64)[0] if what & _QUEUED else 0.0
        vector = self._bytes() if what & _VECTOR else None
        return OutputDelta(self._request_id, sample, ids, text, logprobs, reason, stop, error, cached, queue_s, vector)

    def _logprobs(self) -> tuple[TokenLogprobs, ...]:
        (count,) = self._take(_U32)
        chosen = []
        for _ in range(self._bounded(count, _LOGPROB.size)):
            token_id, value, num_top = self._take(_LOGPROB)
            top: Sequence[tuple[int, float]] = [
                self._take(_TOP)  # type: ignore[misc]
                for _ in range(self._bounded(num_top, _TOP.size))
            ]
            chosen.append(TokenLogprobs(token_id, value, tuple(top)))
        return tuple(chosen)

    def _bounded(self, count: int, least_bytes: int) -> int:
        """`count`, if so many parts can follow at all: no work and no memory for numbers that are made up."""
        if count * least_bytes > len(self._frame) - self.at:
            raise IndexError(f"{count} parts are said to follow byte {self.at}")
        return count

    def _take(self, layout: struct.Struct) -> tuple[int, ...]:
        values = layout.unpack_from(self._frame, self.at)
        self.at += layout.size
        return values

    def _many(self, layout: str) -> tuple[int, ...]:
        values = struct.unpack_from(layout, self._frame, self.at)
        self.at += struct.calcsize(layout)
        return values

    def _text(self) -> str:
        return self._bytes().decode("utf-8", "surrogatepass")

    def _bytes(self) -> bytes:
        (count,) = self._take(_U32)
        end = self.at + self._bounded(count, 1)
        raw, self.at = self._frame[self.at : end], end
        return raw
