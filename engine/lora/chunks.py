"""A step's segments as kernels take them: in chunks that one program computes."""

from __future__ import annotations

from engine.core.plan import LoraSegment


def cut_chunks(segments: tuple[LoraSegment, ...], max_rows: int) -> list[tuple[int, int, int]]:
    """First row, rows and slot of each chunk: at most `max_rows` rows of one segment."""
    return [
        (row, min(max_rows, segment.row_end - row), segment.slot)
        for segment in segments
        for row in range(segment.row_start, segment.row_end, max_rows)
    ]


def check_rows(end: int, num_rows: int) -> None:
    """Raises: ValueError if a layer was given fewer rows than the segments, which end before row `end`, name."""
    if end > num_rows:
        raise ValueError(f"segments reach row {end}, the layer was given {num_rows} rows")
