"""Files on disk: their paths and stamps, and records counted through several of them."""

import errno
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ..errors import FileError

Stamp: TypeAlias = tuple[int, int, int] | None
"""Inode, size and modification time of a file; None if it cannot be looked at."""


def paths_of(option: str, given: Any) -> list[Path]:
    """A path, or an iterable of paths, as a list."""
    given = [given] if isinstance(given, str | os.PathLike) else given
    paths = list(given) if isinstance(given, Iterable) else [given]
    for path in paths:
        if not isinstance(path, str | os.PathLike):
            kind = type(path).__name__
            raise TypeError(f"`{option}` is a path or a list of paths, and {kind} is none.")
    return [Path(path) for path in paths]


def stamp(path: str) -> Stamp:
    """The stamp of a file. Readers of a file and of one that replaced it differ by their stamps."""
    try:
        found = os.stat(path)
    except OSError:  # the attempt to open it will say why
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def check_uncut(path: str, size: int, needed: int) -> None:
    """Raises if a memory-mapped file was truncated: reading past its end kills the process."""
    if size < needed:
        raise OSError(f"{path} was cut to {size} bytes and needs {needed}")


class MappedFiles:
    """Files that another library has memory-mapped."""

    def __init__(self, paths: Iterable[str]):
        started = time.perf_counter()
        self._were = {path: found for path in paths if (found := stamp(path)) is not None}
        # The least that a look at all has taken. One that was held up must not put off the next.
        self._seconds = time.perf_counter() - started
        self._rests_until = -math.inf

    def check(self) -> None:
        """Raises if one was truncated. Spends about a twentieth of the time on it, at most."""
        started = time.perf_counter()
        if started < self._rests_until:
            return
        self._check()
        ended = time.perf_counter()
        self._seconds = min(self._seconds, ended - started)
        self._rests_until = ended + 20 * self._seconds

    def _check(self) -> None:
        for path, (inode, size, _) in self._were.items():
            found = stamp(path)
            if found is not None and found[0] == inode:  # else the map is of a file now unlinked
                check_uncut(path, found[1], size)


def unopened(path: str, error: OSError) -> FileError:
    """The error for a file that the system cannot open."""
    reason = f"cannot be opened: {error.strerror or error}."
    if error.errno == errno.EMFILE:
        reason += " A source keeps each of its files open: raise `ulimit -n`, or join some files."
    return FileError(path, reason)


class Segments:
    """Maps record numbers that run on through several files, or pieces of files.

    `lengths` are the numbers of records in each segment.
    """

    def __init__(self, lengths: Sequence[int]):
        self._ends = np.cumsum(lengths, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def segment_of(self, record: int) -> int:
        return int(np.searchsorted(self._ends, record, "right"))

    def divide(self, records: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """For each segment that holds some of the records: its index, the positions of those in
        `records`, and their numbers within the segment."""
        records = records.astype(np.int64)
        segment_of = np.searchsorted(self._ends, records, "right")
        for i in np.unique(segment_of).tolist():
            rows = np.flatnonzero(segment_of == i)
            yield i, rows, records[rows] - (self._ends[i - 1] if i else 0)
