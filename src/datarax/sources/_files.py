"""What sources say of files: which they are, and why one cannot be opened."""

import errno
import os
from typing import TypeAlias

from ..errors import FileError

Stamp: TypeAlias = tuple[int, int, int] | None


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
