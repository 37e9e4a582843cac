"""What the store knows on disk: registered names, versions, images of the disk tier, traffic, pins. One SQLite file.

It is opened, never loaded: a look-up is one statement by primary key, whatever the number of rows. Two threads, one
that reads and one that writes, so that a bulk registration does not stand in the way of a look-up (WAL). Several stores
may have the same file open. Everything in it but the registrations and pins can be found again: a file that is corrupt
or of another schema is set aside and a new one begun.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from adapter_store.names.catalog import ImageKey, NameKey
from adapter_store.names.database import Database, Row, batches
from adapter_store.names.images import IMAGE_COLUMNS, ImageRow, image_row, packed_manifest, unpacked
from adapter_store.names.sealing import Sealer, is_secret
from adapter_store.records import Registration
from adapter_store.sources.base import SourceFile, SourceListing

_log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
Urls = tuple[tuple[str, str], ...]
FILE_NAME = "index.sqlite"
CATALOG = "catalog"  # the source of registered names
_SCHEMA = """
CREATE TABLE registered (name TEXT PRIMARY KEY, source TEXT NOT NULL, location TEXT NOT NULL,
                         urls TEXT NOT NULL, sha256 TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE counted (what TEXT PRIMARY KEY, number INTEGER NOT NULL) WITHOUT ROWID;
CREATE TRIGGER registered_more AFTER INSERT ON registered
    BEGIN UPDATE counted SET number = number + 1 WHERE what = 'registered'; END;
CREATE TRIGGER registered_less AFTER DELETE ON registered
    BEGIN UPDATE counted SET number = number - 1 WHERE what = 'registered'; END;
CREATE TABLE versions (source TEXT, name TEXT, version TEXT NOT NULL, listing TEXT NOT NULL, sha256 TEXT NOT NULL,
                       checked_at REAL NOT NULL, PRIMARY KEY (source, name)) WITHOUT ROWID;
CREATE TABLE images (version TEXT, spec_digest TEXT, object TEXT NOT NULL, num_bytes INTEGER NOT NULL,
                     rank INTEGER NOT NULL, cost_s REAL NOT NULL, uses INTEGER NOT NULL, manifest BLOB NOT NULL,
                     PRIMARY KEY (version, spec_digest));
CREATE TABLE traffic (source TEXT, name TEXT, value REAL NOT NULL, at REAL NOT NULL,
                      PRIMARY KEY (source, name)) WITHOUT ROWID;
CREATE TABLE pins (source TEXT, name TEXT, PRIMARY KEY (source, name)) WITHOUT ROWID;
INSERT INTO counted VALUES ('registered', 0);
"""


class RowBroken(Exception):
    """A row's content is not what was written: the file has no checksums. It never leaves the store."""


class Known(NamedTuple):
    """What a name stood for when it was last looked at (seconds since the epoch), and its files' own digests."""

    version: str
    listing: SourceListing
    sha256: dict[str, str]
    checked_at: float


class Index:
    """See the methods; each raises IndexUnavailable. `path` None keeps everything in memory.

    `may_replace`: nobody else has the file open, so that a broken one may be set aside.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        may_replace: bool = True,
        may_open: bool = True,
        niceness: int = 0,
        sealer: Sealer | None = None,
    ) -> None:
        self.database = Database(
            path, _SCHEMA, SCHEMA_VERSION, may_replace=may_replace, may_open=may_open, niceness=niceness
        )
        self._sealer = sealer or Sealer(None)
        self._urls: dict[str, Urls] = {}  # by name: of registrations whose URLs must not be written

    @property
    def is_durable(self) -> bool:
        """Whether what is written outlives the process."""
        return self.database.path is not None

    # Registered names

    async def registered(self, name: str) -> Registration | None:
        """The row of `name`."""
        rows = await self.database.read("SELECT * FROM registered WHERE name = ?", (name,))
        return self._registration(rows[0]) if rows else None

    async def list_registered(self, after: str | None, limit: int) -> tuple[str, ...]:
        """At most `limit` names behind `after`, in order."""
        rows = await self.database.read(
            "SELECT name FROM registered WHERE name > ? ORDER BY name LIMIT ?", (after or "", limit)
        )
        return tuple(name for (name,) in rows)

    async def num_registered(self) -> int:
        """How many names are registered; counted as they come and go."""
        return int((await self.database.read("SELECT number FROM counted WHERE what = 'registered'"))[0][0])

    async def register(self, rows: Iterable[Registration]) -> None:
        """Writes `rows`, over those of the same names. A call that is cut off leaves whole batches."""
        statement = (
            "INSERT INTO registered VALUES (?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET source = excluded.source, "
            "location = excluded.location, urls = excluded.urls, sha256 = excluded.sha256"
        )
        forget = "DELETE FROM versions WHERE source = ? AND name = ?"  # it may have stood for another place
        for batch in batches(rows):
            written = [self._row(row) for row in batch]
            await self.database.transact(partial(_write_registered, statement=statement, rows=written))
            for row, values in zip(batch, written, strict=True):
                self._urls.pop(row.name, None)
                if row.urls and self._sealer.open(values[3]) is None:
                    self._urls[row.name] = row.urls
            await self.database.write(forget, [(CATALOG, row.name) for row in batch])

    async def unregister(self, names: Sequence[str]) -> tuple[str, ...]:
        """Deletes the rows of `names`; returns those that were there."""
        gone: list[str] = []
        for batch in batches(names):
            gone += await self.database.transact(partial(_delete_registered, names=batch))
        for name in gone:
            self._urls.pop(name, None)
        return tuple(gone)

    async def reseal(self) -> None:
        """Secrets that an earlier program wrote readable are encrypted, or left out and kept in memory."""
        for name, source, location, urls, sha256 in await self.database.read(
            "SELECT * FROM registered WHERE urls LIKE '%://%'"
        ):
            if is_secret(urls):
                await self.register([self._registration((name, source, location, urls, sha256))])
        for listing, *key in await self.database.read(
            "SELECT listing, source, name FROM versions WHERE listing LIKE '%://%'"
        ):
            if is_secret(listing):
                row = (self._sealer.seal(listing), *key)
                await self.database.write("UPDATE versions SET listing = ? WHERE source = ? AND name = ?", [row])

    # Registrations and pins as they are mirrored

    async def number(self) -> int:
        """Rises with each change of registrations and pins."""
        rows = await self.database.read("SELECT number FROM counted WHERE what = 'changes'")
        return int(rows[0][0]) if rows else 0

    async def rows(self, names: Sequence[str]) -> list[Row]:
        """The rows of `names` as they are written: URLs with secrets are encrypted, or were left out."""
        found: list[Row] = []
        for name in names:
            found += await self.database.read("SELECT * FROM registered WHERE name = ?", (name,))
        return found

    async def replace_all(self, rows: Sequence[Row], pins: Sequence[NameKey], number: int) -> None:
        """What `rows`, `pins` and `number` say takes the place of all that was registered and pinned."""
        await self.database.transact(partial(_replace_all, rows=rows, pins=pins, number=number))

    # Versions

    async def known(self, key: NameKey) -> Known | None:
        """What `key` last stood for."""
        rows = await self.database.read(
            "SELECT version, listing, sha256, checked_at FROM versions WHERE source = ? AND name = ?", tuple(key)
        )
        if not rows:
            return None
        version, listing, sha256, checked_at = rows[0]
        try:
            listing = self._sealer.open(listing)
            if listing is None:
                return None
            return Known(version, _listing(json.loads(listing)), dict(json.loads(sha256)), float(checked_at))
        except (ValueError, KeyError, TypeError) as error:
            _log.warning("what the index knows of adapter %s is broken, its source is asked: %s", key.name, error)
            return None

    async def remember(self, key: NameKey, known: Known) -> None:
        """What `key` stands for now."""
        listing = self._sealer.seal(json.dumps(asdict(known.listing)))
        row = (*key, known.version, listing, json.dumps(known.sha256), known.checked_at)
        await self.database.write("INSERT OR REPLACE INTO versions VALUES (?, ?, ?, ?, ?, ?)", [row])

    async def forget_digests(self, key: NameKey) -> None:
        """What the files of `key` were when they were read last does not count any more."""
        await self.database.write("UPDATE versions SET sha256 = '{}' WHERE source = ? AND name = ?", [tuple(key)])

    async def checked(self, checks: Iterable[tuple[NameKey, float]]) -> None:
        """The sources said at these times that these names stand for what is known."""
        rows = [(at, *key) for key, at in checks]
        await self.database.write("UPDATE versions SET checked_at = ? WHERE source = ? AND name = ?", rows)

    async def forget(self, keys: Iterable[NameKey]) -> None:
        """These are not there any more."""
        await self.database.write("DELETE FROM versions WHERE source = ? AND name = ?", [tuple(key) for key in keys])

    # Images of the disk tier

    async def image(self, key: ImageKey) -> tuple[ImageRow, dict[str, Any]] | None:
        """An image and its manifest. Raises: RowBroken, too."""
        rows = await self.database.read(
            f"SELECT {IMAGE_COLUMNS}, manifest FROM images WHERE version = ? AND spec_digest = ?",
            tuple(key),
        )
        try:
            return (image_row(rows[0]), unpacked(rows[0][8])) if rows else None
        except (ValueError, TypeError, zlib.error) as error:
            raise RowBroken(f"{type(error).__name__}: {error}") from error

    async def images(self, after: int, limit: int) -> tuple[tuple[int, ImageRow], ...]:
        """At most `limit` images behind row `after`, each with the number of its row."""
        rows = await self.database.read(
            f"SELECT {IMAGE_COLUMNS}, rowid FROM images WHERE rowid > ? ORDER BY rowid LIMIT ?", (after, limit)
        )
        return tuple((row[8], image_row(row)) for row in rows)

    async def add_image(self, row: ImageRow, manifest: dict[str, Any]) -> None:
        """Writes one image."""
        packed = packed_manifest(manifest, row.notices)
        values = (*row.key, row.object, row.num_bytes, row.rank, row.cost_s, row.uses, packed)
        await self.database.write("INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?)", [values])

    async def drop_images(self, keys: Iterable[ImageKey]) -> None:
        """Deletes images."""
        await self.database.write("DELETE FROM images WHERE version = ? AND spec_digest = ?", [tuple(k) for k in keys])

    async def used(self, uses: Iterable[tuple[ImageKey, int]]) -> None:
        """How often images were used."""
        rows = [(number, *key) for key, number in uses]
        await self.database.write("UPDATE images SET uses = ? WHERE version = ? AND spec_digest = ?", rows)

    # Traffic and pins

    async def traffic(self, limit: int) -> tuple[tuple[NameKey, float, float], ...]:
        """(name, decayed count, when), at most `limit`, the latest first."""
        rows = await self.database.read(
            "SELECT source, name, value, at FROM traffic ORDER BY at DESC LIMIT ?", (limit,)
        )
        return tuple((NameKey(source, name), value, at) for source, name, value, at in rows)

    async def set_traffic(self, counts: Iterable[tuple[NameKey, float, float]], before: float) -> None:
        """Writes counts, and forgets those that have not changed since `before`."""
        rows = [(*key, value, at) for key, value, at in counts]
        await self.database.write("INSERT OR REPLACE INTO traffic VALUES (?, ?, ?, ?)", rows)
        await self.database.write("DELETE FROM traffic WHERE at < ?", [(before,)])

    async def pins(self) -> tuple[NameKey, ...]:
        """All pinned names."""
        return tuple(NameKey(*row) for row in await self.database.read("SELECT source, name FROM pins"))

    async def set_pin(self, key: NameKey, is_pinned: bool) -> None:
        """Pins or unpins a name."""
        add, drop = "INSERT OR REPLACE INTO pins VALUES (?, ?)", "DELETE FROM pins WHERE source = ? AND name = ?"
        await self.database.transact(partial(_change, add if is_pinned else drop, [tuple(key)]))

    def _row(self, row: Registration) -> Row:
        urls = self._sealer.seal(json.dumps(row.urls))
        return row.name, row.source, row.location, urls, json.dumps(row.sha256)

    def _registration(self, row: Row) -> Registration:
        name, source, location, urls, sha256 = row
        kept = self._sealer.open(urls)
        is_lost = kept is None and name not in self._urls
        return Registration(
            name=name,
            source=source,
            location=location,
            urls=_pairs(kept) if kept is not None else self._urls.get(name, ()),
            sha256=_pairs(sha256),
            has_lost_urls=is_lost,
        )


def _pairs(text: str) -> Urls:
    return tuple((str(first), str(second)) for first, second in json.loads(text))


def _listing(plain: dict[str, Any]) -> SourceListing:
    return SourceListing(files=tuple(SourceFile(**file) for file in plain["files"]), origin=plain["origin"])


def _change(statement: str, rows: Sequence[Row], writer: sqlite3.Connection) -> None:
    """A change that the mirror must hear of."""
    writer.executemany(statement, rows)
    writer.execute("INSERT OR IGNORE INTO counted VALUES ('changes', 0)")
    writer.execute("UPDATE counted SET number = number + 1 WHERE what = 'changes'")


def _write_registered(writer: sqlite3.Connection, statement: str, rows: Sequence[Row]) -> None:
    _change(statement, rows, writer)


def _replace_all(writer: sqlite3.Connection, rows: Sequence[Row], pins: Sequence[NameKey], number: int) -> None:
    writer.execute("DELETE FROM registered")
    writer.execute("DELETE FROM versions WHERE source = ?", (CATALOG,))
    writer.execute("DELETE FROM pins")
    writer.executemany("INSERT INTO registered VALUES (?, ?, ?, ?, ?)", rows)
    writer.executemany("INSERT INTO pins VALUES (?, ?)", [tuple(key) for key in pins])
    writer.execute("INSERT OR REPLACE INTO counted VALUES ('changes', ?)", (number,))


def _delete_registered(writer: sqlite3.Connection, names: Sequence[str]) -> list[str]:
    gone = [name for name in names if writer.execute("DELETE FROM registered WHERE name = ?", (name,)).rowcount]
    _change("DELETE FROM versions WHERE source = ? AND name = ?", [(CATALOG, name) for name in gone], writer)
    return gone
