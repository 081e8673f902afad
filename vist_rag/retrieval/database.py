"""One SQLite file, opened with care: ours and nobody else's, transactions that hold, errors that say what helps."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vist_rag.errors import StoreError

APPLICATION_ID = 0x56495354  # "VIST", in the file's header: tells our files from those of others


def utf8(text: str) -> bytes:
    """A text parameter, for ``CAST(? AS TEXT)``: bytes, since Python hands SQLite no string with a lone surrogate."""
    return text.encode("utf-8", "surrogatepass")


def is_writable(directory: Path) -> bool:
    """Whether files can be made in a directory."""
    return os.access(directory, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


@dataclass(frozen=True)
class Schema:
    """What a file must hold.

    Attributes:
        version: The version that this code reads and writes.
        tables: Statements that make tables, indexes and triggers.
        first_rows: Fills a new file, within the transaction that makes it.
        migrations: By version: brings a file of that version to the next one, within a transaction.
    """

    version: int
    tables: Sequence[str]
    first_rows: Callable[[Database], None]
    migrations: Mapping[int, Callable[[Database], None]]

    def expected(self) -> dict[str, str]:
        """The statement that made each table, index and trigger, by name, as SQLite keeps it."""
        with closing(sqlite3.connect(":memory:")) as empty:
            for statement in self.tables:
                empty.execute(statement)
            return dict(empty.execute(_MADE_BY))


_MADE_BY = "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite~_%' ESCAPE '~'"
_WAL_BYTES = 64 * 2**20  # what is left of the write-ahead log on the disk once it has been written back


class Database:
    """A SQLite file with a schema version, in WAL mode, shared by the threads of this process.

    Args:
        path: The file; made where it is missing, unless ``read_only``.
        schema: What it holds. A file of an earlier version is brought up to date, in one transaction.
        read_only: Never write to the file; it must exist.
        timeout_s: How long to wait for another process's write.
    Raises:
        StoreError: If the file is missing (read-only), locked, damaged, of another program, of a newer version (or of
            an earlier one, read-only), or cannot be opened.
    """

    def __init__(self, path: Path, *, schema: Schema, read_only: bool, timeout_s: float) -> None:
        self.path = path
        self.read_only = read_only
        self._lock = threading.RLock()
        self._depth = 0  # of nested transactions
        self._connection: sqlite3.Connection | None = None
        with self._translated():
            self._connection = self._connect(timeout_s)
            try:
                if not read_only:
                    self.execute("PRAGMA synchronous = FULL")
                    self.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES}")
                self.execute("PRAGMA cell_size_check = ON")  # a damaged page is told instead of misread
                self.execute("PRAGMA trusted_schema = OFF")
                self._check_or_create(schema)
            except BaseException:
                self.close()
                raise

    def _connect(self, timeout_s: float) -> sqlite3.Connection:
        mode = "rwc"
        if self.read_only:
            if not self.path.is_file():
                raise StoreError(f"{self.path} does not exist; check the directory, or index something into it first.")
            mode = "ro" if is_writable(self.path.parent) else self._mode_without_shared_memory()
        uri = f"file:{quote(os.fsencode(self.path.absolute()))}?mode={mode}"
        connection = sqlite3.connect(uri, uri=True, timeout=timeout_s, isolation_level=None, check_same_thread=False)
        connection.text_factory = lambda data: data.decode("utf-8", "surrogatepass")
        return connection

    def _mode_without_shared_memory(self) -> str:
        """WAL needs a shared-memory file beside the store; a read-only directory may have one, and may get none."""
        journal = Path(f"{self.path}-wal")
        if not journal.exists() or journal.stat().st_size == 0:
            return "ro&immutable=1"
        if Path(f"{self.path}-shm").exists():
            return "ro"
        raise StoreError(
            f"{self.path} has writes in {journal.name}, which cannot be read in a read-only directory; open it once "
            "where the directory is writable."
        )

    def _check_or_create(self, schema: Schema) -> None:
        application, found = self.value("PRAGMA application_id"), self.value("PRAGMA user_version")
        if application == APPLICATION_ID:
            self._check_version(schema, found)
        elif application or found or self.value("SELECT count(*) FROM sqlite_master"):
            raise StoreError(f"{self.path} is a SQLite file of another program; choose another directory.")
        elif self.read_only:
            raise StoreError(f"{self.path} is empty; index something into it first.")
        else:
            self.execute("PRAGMA journal_mode = WAL")
            with self.transaction():
                if self.value("PRAGMA application_id") != APPLICATION_ID:  # else another process was faster
                    for statement in schema.tables:
                        self.execute(statement)
                    schema.first_rows(self)
                    self.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                    self.execute(f"PRAGMA user_version = {schema.version}")
        if dict(self.execute(_MADE_BY)) != schema.expected():
            raise StoreError(
                f"{self.path} has other tables than a store of version {schema.version}: another program changed them, "
                "or it is damaged; restore it from a copy, or index anew into another directory."
            )

    def _check_version(self, schema: Schema, found: int) -> None:
        if found == schema.version:
            return
        if found not in schema.migrations:
            raise StoreError(
                f"{self.path} has schema version {found}, this vist-rag reads {schema.version}; "
                "pip install --upgrade vist-rag, or index into another directory."
            )
        if self.read_only:
            raise StoreError(
                f"{self.path} has schema version {found}, this vist-rag reads {schema.version}; open it once for "
                "writing (vist-rag index --stats --index DIR), which brings it up to date."
            )
        with self.transaction():
            while (found := self.value("PRAGMA user_version")) in schema.migrations:  # none: another process was faster
                schema.migrations[found](self)
                self.execute(f"PRAGMA user_version = {found + 1}")

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` has been called."""
        return self._connection is None

    def execute(self, sql: str, *values: object) -> sqlite3.Cursor:
        """Run one statement; only within :meth:`reading`, :meth:`snapshot` or :meth:`transaction`."""
        return self._open.execute(sql, values)

    def value(self, sql: str, *values: object) -> Any:
        """The first column of the first row; None where there is no row."""
        row = self.execute(sql, *values).fetchone()
        return row[0] if row else None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Statements within are alone on the connection, and their errors are :class:`StoreError`."""
        with self._lock, self._translated():
            yield

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """As :meth:`reading`, other threads wait; all reads within see one state, whatever other processes write."""
        with self._scope("BEGIN"):
            yield

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """One write transaction: all of the body, or nothing where it raises. May be nested; other writers wait.

        Raises:
            StoreError: If the file is open read-only, or locked for longer than the timeout.
        """
        self.require_writable()
        with self._scope("BEGIN IMMEDIATE"):
            yield

    def require_writable(self) -> None:
        """Do nothing, or raise :class:`StoreError` where the file is open read-only."""
        if self.read_only:
            raise StoreError(f"{self.path} is open read-only; open it for writing, in a directory that can be written.")

    def compact(self) -> None:
        """Give what deleted rows left free back to the disk; needs as much free space as the file is large.

        Raises:
            StoreError: If the file is open read-only or locked, or the disk is full.
        """
        self.require_writable()
        with self.reading():
            self.execute("VACUUM")
            self.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    @contextmanager
    def _scope(self, begin: str) -> Iterator[None]:
        with self.reading():
            if self._depth == 0:
                self.execute(begin)
            self._depth += 1
            try:
                yield
                if self._depth == 1:
                    self.execute("COMMIT")
            except BaseException:
                if self._depth == 1 and self._open.in_transaction:
                    self._open.rollback()
                raise
            finally:
                self._depth -= 1

    @property
    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            raise StoreError(f"{self.path} has been closed; open it again.")
        return self._connection

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreError(f"{self.path} {_reason(error)} ({error}).") from error
        except UnicodeDecodeError as error:
            raise StoreError(f"{self.path} {_REASONS['SQLITE_CORRUPT']} ({error}).") from error


_REASONS = {
    "SQLITE_BUSY": "is locked by another process; wait for its write to end, or close it",
    "SQLITE_LOCKED": "is locked by another connection; wait for its write to end, or close it",
    "SQLITE_READONLY": "cannot be written; check the permissions of the file and its directory",
    "SQLITE_CANTOPEN": "cannot be opened; check that its directory exists and can be written",
    "SQLITE_PERM": "cannot be opened; check its permissions",
    "SQLITE_FULL": "cannot grow, the disk is full; free some space and repeat, nothing that was stored is lost",
    "SQLITE_NOTADB": "is not a SQLite file, or its header is damaged; restore it from a copy, or index anew elsewhere",
    "SQLITE_CORRUPT": "is damaged; restore it from a copy, or index anew into another directory",
}


def _reason(error: sqlite3.Error) -> str:
    """What is wrong and what helps, to follow the name of the file."""
    name = getattr(error, "sqlite_errorname", "") or "an unnamed error"
    return next((text for prefix, text in _REASONS.items() if name.startswith(prefix)), f"failed with {name}")
