"""One SQLite file with a reading and a writing thread: opened, tried again, set aside when it is broken.

Knows nothing of what is in it but its schema's version. Several processes may have the same file open (WAL).
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from adapter_store.sources.threads import nice_pool

_log = logging.getLogger(__name__)

BATCH_ROWS = 2_000  # of one transaction: between two of them other writes have their turn
_CACHE_KIB = 2_048
_BUSY_TIMEOUT_S = 5.0

Row = tuple[Any, ...]


class IndexUnavailable(Exception):
    """The file cannot be read or written now. It never leaves the store."""


class Database:
    """`path` None keeps everything in memory. `may_replace`: nobody else has the file open, a broken one may go.

    `schema` is run on an empty file, which then has `schema_version` as its user_version; a file with another one is
    broken, too. `may_open` False: it belongs to somebody else until `reopen`, and there is a stand-in in memory.
    """

    def __init__(
        self,
        path: Path | None,
        schema: str,
        schema_version: int,
        *,
        may_replace: bool,
        niceness: int,
        may_open: bool = True,
    ) -> None:
        self.path = path
        self.is_writable = True  # False: what can be read is read, or an empty stand-in, until `reopen` works
        self._schema, self._schema_version = schema, schema_version
        self._may_replace = may_replace
        self._lock = threading.RLock()  # held while connections change
        self._reader: sqlite3.Connection
        self._writer: sqlite3.Connection
        self._retired: list[sqlite3.Connection] = []  # another thread may be in the middle of using one
        self._writes = nice_pool(1, "adapters-index-write", niceness)
        self._reads = self._writes if path is None else nice_pool(1, "adapters-index-read")
        self._open(may_open)

    async def read(self, statement: str, values: Row = ()) -> list[Row]:
        """The rows of a query. Raises: IndexUnavailable."""
        rows: list[Row] = await self._run(self._reads, self._read, statement, values)
        return rows

    async def write(self, statement: str, rows: Iterable[Row]) -> None:
        """Runs `statement` for each of `rows`, a transaction for every BATCH_ROWS. Raises: IndexUnavailable."""
        for batch in batches(rows):
            await self._run(self._writes, self._write, partial(_execute_many, statement, batch))

    async def transact(self, call: Callable[[sqlite3.Connection], Any]) -> Any:
        """What `call` returns, run in a transaction of its own. Raises: IndexUnavailable."""
        return await self._run(self._writes, self._write, call)

    async def reopen(self, may_replace: bool) -> bool:
        """Tries again to have the file for writing, if it is not; whether it is now."""
        self._may_replace = may_replace
        if not self.is_writable:
            await self._run(self._writes, self._reopen)
        return self.is_writable

    def close(self) -> None:
        """Ends the threads when they have done what they were given, and closes the file."""
        self._writes.shutdown()
        self._reads.shutdown()
        for connection in {id(each): each for each in (*self._retired, self._reader, self._writer)}.values():
            connection.close()

    # In the threads

    async def _run(self, pool: ThreadPoolExecutor, call: Callable[..., Any], *values: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(pool, call, *values)

    def _read(self, statement: str, values: Row) -> list[Row]:
        rows: list[Row] = self._guarded(lambda: self._reader.execute(statement, values).fetchall())
        return rows

    def _write(self, call: Callable[[sqlite3.Connection], Any]) -> Any:
        return self._guarded(lambda: self._transaction(call))

    def _transaction(self, call: Callable[[sqlite3.Connection], Any]) -> Any:
        if not self.is_writable:
            raise IndexUnavailable(f"{self.path} cannot be written now")
        writer = self._writer
        writer.execute("BEGIN IMMEDIATE")
        try:
            result = call(writer)
            writer.execute("COMMIT")
            return result
        except BaseException:
            if writer.in_transaction:  # a full disk has ended it already
                writer.execute("ROLLBACK")
            raise

    def _guarded(self, call: Callable[[], Any]) -> Any:
        seen = self._writer
        try:
            return call()
        except sqlite3.OperationalError as error:
            raise IndexUnavailable(f"{self.path}: {error}") from error
        except sqlite3.DatabaseError as error:
            with self._lock:
                if self._writer is seen and self._may_replace and self.path is not None:
                    self._set_aside(self.path, error)
                    self._open()
            raise IndexUnavailable(f"{self.path}: {error}") from error

    # Opening

    def _open(self, may_open: bool = True) -> None:
        """The file for writing; if that fails, as it is, read-only; if that fails, a stand-in in memory."""
        with self._lock:
            if self.path is None:
                connection = self._create(":memory:")
                self._use(connection, connection)
                return
            if not may_open:
                self.is_writable = False
                connection = self._create(":memory:")
                self._use(connection, connection)
                return
            try:
                self._use(*self._open_file(self.path))
                self.is_writable = True
                return
            except (sqlite3.Error, OSError) as error:
                self.is_writable = False
                _log.error("the index %s cannot be written, nothing can be registered now: %s", self.path, error)
            try:
                connection = self._open_as_it_is(self.path)
            except sqlite3.Error as error:
                _log.error("the index %s cannot be read, registered names are not known now: %s", self.path, error)
                connection = self._create(":memory:")
            self._use(connection, connection)

    def _reopen(self) -> None:
        """The file for writing; if that fails, all stays as it is, and nothing is said again."""
        assert self.path is not None
        with self._lock:
            try:
                self._use(*self._open_file(self.path))
            except (sqlite3.Error, OSError) as error:
                _log.debug("the index %s still cannot be written: %s", self.path, error)
            else:
                self.is_writable = True
                _log.info("the index %s can be written again", self.path)

    def _use(self, writer: sqlite3.Connection, reader: sqlite3.Connection) -> None:
        if hasattr(self, "_reader"):
            self._retired += [self._reader, self._writer]
        self._writer, self._reader = writer, reader

    def _open_file(self, path: Path) -> tuple[sqlite3.Connection, sqlite3.Connection]:
        """A connection to write and one to read."""
        try:
            writer = self._create(str(path))
        except sqlite3.OperationalError:
            raise  # no permission, no room: a new file would not help
        except sqlite3.DatabaseError as error:
            if not self._may_replace:
                raise
            self._set_aside(path, error)
            writer = self._create(str(path))
        try:
            return writer, _connect(str(path))
        except BaseException:
            writer.close()
            raise

    def _open_as_it_is(self, path: Path) -> sqlite3.Connection:
        """Neither lock nor log: what the file itself says, without what was written last."""
        connection = _connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
        try:
            self._check_version(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _create(self, path: str) -> sqlite3.Connection:
        connection = _connect(path)
        try:
            connection.execute("PRAGMA journal_mode = WAL").fetchall()
            connection.execute("BEGIN IMMEDIATE")  # of two processes that begin one file, one waits
            is_new = not connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchall()
            for statement in self._schema.split(";\n") if is_new else ():
                connection.execute(statement)
            if is_new:
                connection.execute(f"PRAGMA user_version = {self._schema_version}")
            connection.execute("COMMIT")
            self._check_version(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _check_version(self, connection: sqlite3.Connection) -> None:
        ((found,),) = connection.execute("PRAGMA user_version").fetchall()
        if found != self._schema_version:
            raise sqlite3.DatabaseError(f"its schema version is {found}, this program's is {self._schema_version}")

    def _set_aside(self, path: Path, error: sqlite3.DatabaseError) -> None:
        aside = f"{path.name}.broken-{time.time_ns()}"
        _log.error(
            "the index %s cannot be used (%s): it is kept as %s and a new one is begun; "
            "register and pin again, everything else is found again",
            path,
            error,
            aside,
        )
        for suffix in ("", "-wal", "-shm"):
            moved = path.with_name(path.name + suffix)
            if moved.exists():
                moved.rename(path.with_name(aside + suffix))


def batches(rows: Iterable[Any]) -> Iterator[list[Any]]:
    """`rows`, BATCH_ROWS at a time."""
    left = iter(rows)
    while batch := list(islice(left, BATCH_ROWS)):
        yield batch


def _execute_many(statement: str, rows: list[Row], writer: sqlite3.Connection) -> None:
    writer.executemany(statement, rows)  # its cursor must not outlive this: a file with one open is not closed


def _connect(path: str, *, uri: bool = False) -> sqlite3.Connection:
    # Used in one thread at a time; transactions are begun by name.
    connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False, uri=uri)
    connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA secure_delete = ON")  # what was replaced may have been a secret
    return connection
