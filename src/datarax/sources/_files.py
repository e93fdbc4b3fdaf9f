"""What sources say of files: which they are, and why one cannot be opened."""

import errno
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import FileError

Stamp: TypeAlias = tuple[int, int, int] | None


def paths_of(option: str, given: Any) -> list[Path]:
    """The paths that an option lists, or the only one."""
    given = [given] if isinstance(given, str | os.PathLike) else given
    paths = list(given) if isinstance(given, Iterable) else [given]
    for path in paths:
        if not isinstance(path, str | os.PathLike):
            kind = type(path).__name__
            raise TypeError(f"`{option}` is a path or a list of paths, and {kind} is none.")
    return [Path(path) for path in paths]


def stamp(path: str) -> Stamp:
    """What tells a file from another that takes its place, so that their readers are not equal."""
    try:
        found = os.stat(path)
    except OSError:  # whoever opens it will say why
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def unopened(path: str, error: OSError) -> FileError:
    """What is wrong with a file that cannot be opened."""
    reason = f"cannot be opened: {error.strerror or error}."
    if error.errno == errno.EMFILE:
        reason += " A source keeps each of its files open: raise `ulimit -n`, or join some files."
    return FileError(path, reason)
