"""Replies on disk, each stored the moment it arrives."""

import contextlib
import pathlib
import sqlite3
import threading
from collections.abc import Iterator

from paxo.judges.checks import JudgeError


class ReplyCache:
    """Key -> text in one SQLite file; safe against a kill at any moment, threads and processes.

    A reply is either stored whole or not at all, and what is stored is never changed.

    Args:
        path: the file; it and its folder are made where they are missing.

    >>> cache = ReplyCache(":memory:")
    >>> cache.put("key", "reply")
    >>> cache.get("key"), cache.get("other"), len(cache)
    ('reply', None, 1)
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = str(path)
        self._lock = threading.Lock()
        with self._named():
            if self.path != ":memory:":
                pathlib.Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(self.path, timeout=60, check_same_thread=False)
            with self._file:
                self._file.execute(
                    "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL)"
                )

    def get(self, key: str) -> str | None:
        """The reply to a key, or None."""
        with self._lock, self._named():
            query = "SELECT reply FROM replies WHERE key = ?"
            found = self._file.execute(query, (key,)).fetchone()
        return None if found is None else found[0]

    def put(self, key: str, reply: str) -> None:
        """Stores a reply, on disk when this returns; an earlier one to the same key stays."""
        with self._lock, self._named(), self._file:
            self._file.execute("INSERT OR IGNORE INTO replies VALUES (?, ?)", (key, reply))

    def __len__(self) -> int:
        with self._lock, self._named():
            return self._file.execute("SELECT COUNT(*) FROM replies").fetchone()[0]

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._file.close()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise JudgeError(
                f"the file of replies {self.path} cannot be used ({error}): name another, or "
                "remove it if it holds none"
            ) from error
