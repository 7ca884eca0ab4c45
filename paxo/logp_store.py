"""Log-probs of a frozen policy on disk, one entry a sequence, keyed by content.

Rows are packed anew each epoch, so what is stored belongs to a prompt and its completion, not to
a row or an index. The key is a hash of everything the number depends on: a fingerprint of the
policy (weights, tokenizer, template, dtype), the kind of entry, and the token ids. A store filled
by one run is read by every other run with the same fingerprint.

Each process appends to a file of its own, and what `put_many` was given is on the disk when it
returns: a kill at any moment loses no more than the call under way.

    file  = entry*                                                              little-endian
    entry = marker [4] · key [16] · kind [1] · n [4] · n float32 · CRC-32 of all before it [4]
"""

import dataclasses
import fcntl
import hashlib
import logging
import os
import pathlib
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, Literal

import numpy as np

logger = logging.getLogger(__name__)

Kind = Literal["logps", "token_logps"]
TokenIds = Sequence[int] | np.ndarray
Entry = tuple[Kind, TokenIds, TokenIds, np.ndarray | float]

KINDS: dict[str, int] = {"logps": 1, "token_logps": 2}
MARKER = b"\xf5LP1"
HEAD = struct.Struct("<4s16sBI")
CHECK = struct.Struct("<I")


class LogpStore:
    """Log-probs in nats of one frozen policy: `<folder>/<process>.bin`, other processes' beside it.

    Args:
        folder: made if it is not there; several stores may share it when `process` differs.
        fingerprint: names the policy: whatever the numbers depend on besides the token ids.
        process: number of this process; its file is locked until `close`.

    Attributes:
        hits: sequences found by `get` since the store was opened.
        misses: sequences that `get` did not find.

    Raises:
        OSError: the folder cannot be written, or another program writes the same file.

    >>> import tempfile
    >>> with LogpStore(tempfile.mkdtemp(), fingerprint="sft step 500, float32") as store:
    ...     store.put_many([("logps", [5, 6], [7, 8, 9], -12.5)])
    ...     store.get("logps", [5, 6], [7, 8, 9]), store.get("logps", [5, 6], [7]), store.hits
    (np.float32(-12.5), None, 1)
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: str, *, process: int = 0):
        self.folder = pathlib.Path(folder)
        self.hits = 0
        self.misses = 0
        # Fingerprints have any length, their hashes one: no end of one is taken for token ids.
        self._prefix = hashlib.blake2b(fingerprint.encode(), digest_size=16).digest()
        self._scalars: dict[bytes, float] = {}
        self._arrays: dict[bytes, _Place] = {}
        self._files: list[BinaryIO] = []
        own = self.folder / f"{process}.bin"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._own = own.open("a+b", buffering=0)
        except OSError as error:
            raise OSError(
                f"the log-prob store {self.folder} cannot be written ({error.strerror}): "
                "name a folder that can"
            ) from error
        self._lock(own)
        self._load(own)

    def _lock(self, own: pathlib.Path) -> None:
        try:
            fcntl.flock(self._own, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._own.close()
            raise OSError(
                f"{own} is being written by another run: "
                "wait until it ends or name another folder for the store"
            ) from None

    def _load(self, own: pathlib.Path) -> None:
        # One's own file first: where two hold a sequence, a process reads again what it wrote.
        others = sorted(path for path in self.folder.glob("*.bin") if path != own)
        self._files = [self._own, *(path.open("rb") for path in others)]
        for number, (path, file) in enumerate(zip([own, *others], self._files)):
            scan = _Scan(path, file)
            for key, kind, offset, values in scan:
                self._add(key, kind, number, offset, values)
            scan.report()
            if file is self._own and scan.good_end < scan.size:
                os.ftruncate(file.fileno(), scan.good_end)

    def _add(self, key: bytes, kind: int, file: int, offset: int, values: np.ndarray) -> None:
        if kind == KINDS["logps"]:
            self._scalars.setdefault(key, float(values[0]))
        else:
            self._arrays.setdefault(key, _Place(file, offset, len(values)))

    def get(
        self, kind: Kind, prompt: TokenIds, completion: TokenIds
    ) -> np.float32 | np.ndarray | None:
        """What is stored for a sequence, or None.

        `"logps"`: the log-prob of the completion. `"token_logps"`: `[n]`, those of its n tokens.
        """
        key = self._key(kind, prompt, completion)
        found = self._scalars.get(key) if kind == "logps" else self._arrays.get(key)
        self.hits += found is not None
        self.misses += found is None
        if isinstance(found, _Place):
            data = os.pread(self._files[found.file].fileno(), 4 * found.length, found.offset)
            return np.frombuffer(data, "<f4").astype(np.float32)
        return None if found is None else np.float32(found)

    def put_many(self, entries: Iterable[Entry]) -> None:
        """Append `(kind, prompt, completion, values)` for each sequence that is not there yet.

        Raises:
            ValueError: a value is NaN, or its shape does not fit the kind. Nothing is stored then.
            OSError: the disk is full. Nothing is stored then, and the file is as it was.
        """
        fresh: dict[bytes, tuple[int, np.ndarray]] = {}
        for kind, prompt, completion, values in entries:
            key = self._key(kind, prompt, completion)
            if key not in self._scalars and key not in self._arrays:
                fresh.setdefault(key, (KINDS[kind], _checked(kind, values)))
        if not fresh:
            return
        start = self._append(b"".join(_encoded(key, *entry) for key, entry in fresh.items()))
        for key, (kind, values) in fresh.items():
            self._add(key, kind, 0, start + HEAD.size, values)
            start += HEAD.size + 4 * len(values) + CHECK.size

    def _append(self, data: bytes) -> int:
        """Write all of `data` and wait for the disk; returns where it starts."""
        start = self._own.seek(0, os.SEEK_END)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self._own.write(rest) :]
            os.fsync(self._own.fileno())
        except OSError as error:
            os.ftruncate(self._own.fileno(), start)
            raise OSError(
                f"cannot write {len(data)} bytes to {self._own.name} ({error.strerror}): "
                "make room and run the same command again; what was stored before is kept"
            ) from error
        return start

    def _key(self, kind: Kind, prompt: TokenIds, completion: TokenIds) -> bytes:
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {sorted(KINDS)}, not {kind!r}")
        separator = b"\xff\xff\xff\xff"  # -1: no token id
        content = separator.join((_id_bytes("prompt", prompt), _id_bytes("completion", completion)))
        head = self._prefix + bytes([KINDS[kind]])
        return hashlib.blake2b(head + content, digest_size=16).digest()

    def __len__(self) -> int:
        return len(self._scalars) + len(self._arrays)

    def close(self) -> None:
        """Give the file back; nothing is waiting to be written."""
        for file in self._files:
            file.close()

    def __enter__(self) -> "LogpStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """Where the floats of a token-level entry lie: number of the file, byte offset, how many."""

    file: int
    offset: int
    length: int


class _Scan:
    """Yields the whole entries of a file: (key, kind, offset of the floats, values)."""

    def __init__(self, path: pathlib.Path, file: BinaryIO):
        self.path = path
        self.size = os.fstat(file.fileno()).st_size
        self.good_end = 0  # all after this byte is a torn tail
        self.damaged = 0

    def __iter__(self) -> Iterator[tuple[bytes, int, int, np.ndarray]]:
        with self.path.open("rb", buffering=1 << 20) as file:
            position = 0
            while position < self.size:
                file.seek(position)
                entry = _read_entry(file, self.size - position)
                if entry is None:
                    position = self._next_entry(file, position + 1)
                    continue
                key, kind, values = entry
                yield key, kind, position + HEAD.size, values
                position += HEAD.size + 4 * len(values) + CHECK.size
                self.good_end = position

    def _next_entry(self, file: BinaryIO, start: int) -> int:
        """Where the next whole entry begins, or the end of the file; counts the damage between."""
        file.seek(start)
        rest = file.read(self.size - start)
        found = rest.find(MARKER)
        while found >= 0:
            file.seek(start + found)
            if _read_entry(file, len(rest) - found) is not None:
                self.damaged += 1
                return start + found
            found = rest.find(MARKER, found + 1)
        return self.size

    def report(self) -> None:
        """Say what was lost."""
        if self.damaged:
            logger.warning("%s: passed over %d damaged stretches", self.path, self.damaged)
        if self.good_end < self.size:
            torn = self.size - self.good_end
            logger.warning("%s: passed over %d bytes of an unfinished write", self.path, torn)


def _read_entry(file: BinaryIO, available: int) -> tuple[bytes, int, np.ndarray] | None:
    """The entry at the file's position, or None where there is no whole and undamaged one."""
    head = file.read(HEAD.size)
    if len(head) < HEAD.size:
        return None
    marker, key, kind, length = HEAD.unpack(head)
    # The length is compared before it is believed: a damaged one may ask for gigabytes.
    if marker != MARKER or HEAD.size + 4 * length + CHECK.size > available:
        return None
    data = file.read(4 * length)
    check = file.read(CHECK.size)
    if check != CHECK.pack(zlib.crc32(data, zlib.crc32(head))):
        return None
    return key, kind, np.frombuffer(data, "<f4")


def _encoded(key: bytes, kind: int, values: np.ndarray) -> bytes:
    head = HEAD.pack(MARKER, key, kind, len(values))
    data = values.tobytes()
    return head + data + CHECK.pack(zlib.crc32(data, zlib.crc32(head)))


def _checked(kind: Kind, values: np.ndarray | float) -> np.ndarray:
    """The values as a flat little-endian float32 array."""
    array = np.asarray(values, "<f4")
    wanted = 0 if kind == "logps" else 1
    if array.ndim != wanted:
        raise ValueError(f"{kind} of a sequence have {wanted} axes; got shape {array.shape}")
    if np.isnan(array).any():
        raise ValueError("a log-prob is NaN: the frozen policy is broken; nothing was stored")
    return array.reshape(-1)


def _id_bytes(name: str, ids: TokenIds) -> bytes:
    array = np.asarray(ids)
    if array.size == 0:
        return b""
    if array.ndim != 1 or array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= 2**31:
        raise ValueError(f"{name} must be a list of token ids from 0 to 2**31 - 1, got {ids!r:.80}")
    return array.astype("<i4").tobytes()
