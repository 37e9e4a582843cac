"""How an adapter's image lies in pages of the KV cache. A pure function: scheduler's side and runner agree by it.

No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from engine.lora.image import ALIGNMENT_BYTES, ITEM_BYTES, AdapterManifest

MAX_GAP_BYTES = 64 << 10  # a guess: a copy of its own would cost about as much


class Piece(NamedTuple):
    """Bytes of the image that belong together (a tensor, or a part of one) and where they go."""

    src: int  # offset in the image
    dst: int  # offset in the run
    num_bytes: int


@dataclass(frozen=True, slots=True)
class PageLayout:
    """Each tensor whole inside one run of neighbouring pages.

    `runs`: their lengths, descending. `tensors`: for each entry of the manifest, (run, offset in it) of each of its
    tensors.
    """

    page_bytes: int
    runs: tuple[int, ...]
    tensors: tuple[tuple[tuple[int, int], ...], ...]
    pieces: tuple[tuple[Piece, ...], ...]  # of each run, ascending by dst

    def first_pages(self, pages: tuple[int, ...]) -> tuple[int, ...]:
        """The first page of each run, out of the pages of all of them."""
        starts = []
        position = 0
        for length in self.runs:
            starts.append(pages[position])
            position += length
        return tuple(starts)


def lay_out(manifest: AdapterManifest, page_bytes: int) -> PageLayout:
    """Largest tensors first, each into the first run with room; a tensor larger than a page opens a longer run.

    `page_bytes` must be a multiple of ALIGNMENT_BYTES.
    """
    item_bytes = ITEM_BYTES[manifest.dtype]
    sizes = [
        (num_bytes, index, which, offset)
        for index, entry in enumerate(manifest.entries)
        for which, (offset, num_bytes) in enumerate(entry.extents(item_bytes))
    ]
    room: list[int] = []  # bytes left at the end of each run
    runs: list[int] = []
    tensors: list[dict[int, tuple[int, int]]] = [{} for _ in manifest.entries]
    pieces: list[list[Piece]] = []
    for num_bytes, index, which, src in sorted(sizes, key=lambda tensor: (-tensor[0], tensor[1:])):
        padded = -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        run = next((run for run, left in enumerate(room) if left >= padded), len(runs))
        if run == len(runs):
            runs.append(-(-padded // page_bytes))
            room.append(runs[-1] * page_bytes)
            pieces.append([])
        dst = runs[run] * page_bytes - room[run]
        tensors[index][which] = (run, dst)
        pieces[run].append(Piece(src, dst, num_bytes))
        room[run] -= padded
    return PageLayout(
        page_bytes,
        tuple(runs),
        tuple(tuple(places[which] for which in sorted(places)) for places in tensors),
        tuple(tuple(of_run) for of_run in pieces),
    )


class Chunk(NamedTuple):
    """Bytes that are put together on the host and copied to the device at once."""

    dst: int  # in the buffer of all pages
    num_bytes: int
    pieces: tuple[Piece, ...]  # `dst` in the chunk


def cut_chunks(layout: PageLayout, pages: tuple[int, ...], max_bytes: int) -> list[Chunk]:
    """The copies of one load: each within neighbouring runs, of at most `max_bytes`, together all tensors."""
    chunks: list[Chunk] = []
    for begin, pieces in _neighbours(layout, pages):
        end = max(piece.dst + piece.num_bytes for piece in pieces)
        for start in range(0, end, max_bytes):
            stop = min(end, start + max_bytes)
            parts = tuple(
                Piece(piece.src + max(0, start - piece.dst), max(0, piece.dst - start), last - first)
                for piece in pieces
                if (first := max(piece.dst, start)) < (last := min(piece.dst + piece.num_bytes, stop))
            )
            chunks.append(Chunk(begin + start, stop - start, parts))
    return chunks


def _neighbours(layout: PageLayout, pages: tuple[int, ...]) -> list[tuple[int, list[Piece]]]:
    """Runs whose pages follow each other as one: where it begins in the buffer, and its pieces, ascending by dst.

    What a run leaves empty at its end is copied with the rest if it is little.
    """
    spans: list[tuple[int, list[Piece]]] = []
    free_from = -1  # in the buffer, behind the run before
    for first_page, length, pieces in zip(layout.first_pages(pages), layout.runs, layout.pieces, strict=True):
        begin = first_page * layout.page_bytes
        if begin == free_from and free_from - _end_of(spans[-1]) <= MAX_GAP_BYTES:
            spans[-1][1].extend(piece._replace(dst=piece.dst + begin - spans[-1][0]) for piece in pieces)
        else:
            spans.append((begin, list(pieces)))
        free_from = begin + length * layout.page_bytes
    return spans


def _end_of(span: tuple[int, list[Piece]]) -> int:
    """Behind its last byte, in the buffer."""
    begin, pieces = span
    return begin + pieces[-1].dst + pieces[-1].num_bytes
