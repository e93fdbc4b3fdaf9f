"""Memory-mapped `.npy` files as a source."""

import dataclasses
import functools
import math
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import jax
import numpy as np
from flax import nnx

from .._types import Batch, Spec, expect, type_text
from ..errors import EmptySourceError, FileError, UnequalLengthsError
from ._buffers import empty_rows
from ._host import HostSource, HostSourceConfig
from ._reader import Reader
from ._storage import Segments, Stamp, check_uncut, paths_of, stamp, unopened
from ._values import need_held_type

PAGE = 2**12
"""Bytes of a row from which consecutive rows are copied one by one. A single large `memcpy` uses
non-temporal stores, which bypass the CPU caches, and takes longer.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingDiskSourceConfig(HostSourceConfig):
    """Which files a `StreamingDiskSource` reads; `HostSourceConfig` has the other options.

    Args:
        path: a `.npy` file, which becomes the field "data", or a folder of them, one per field. A
            list of such files, or of such folders, is read as one, in its order.
    """

    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class StreamingDiskSource(HostSource):
    """Rows of memory-mapped `.npy` files. Reads only the rows that a batch needs.

    Records are on axis 0. Files of Python objects are refused, since nothing is unpickled (spec
    SRC-035).

    Raises:
        FileError: a file is missing or damaged, or its rows differ from those of the others.
        UnequalLengthsError: the files of a folder have different numbers of rows.
        EmptySourceError: there is no file, or no row.
    """

    def __init__(self, config: StreamingDiskSourceConfig, *, rngs: nnx.Rngs | None = None):
        expect("config", config, StreamingDiskSourceConfig)
        paths = paths_of("path", config.path)
        if not paths:
            raise EmptySourceError("`path`, an empty list,")
        files = tuple(map(_files, paths))
        stamps = tuple(stamp(file) for named in files for _, file in named)
        super().__init__(NpyReader(files, stamps), config, rngs=rngs)


class _MappedArray(NamedTuple):
    """A memory-mapped file. `rows` is a view of the map; the file must keep `end` bytes."""

    file: str
    map: mmap.mmap | None
    rows: np.ndarray
    end: int


@dataclasses.dataclass(frozen=True)
class NpyReader(Reader):
    """Reads folders of `.npy` files. `files` has pairs of a field and its file for each folder."""

    label, only_copies = "StreamingDiskSource", True

    files: tuple[tuple[tuple[str, str], ...], ...]
    stamps: tuple[Stamp, ...]

    def __len__(self) -> int:
        return len(self._segments)

    @functools.cached_property
    def _columns(self) -> list[dict[str, _MappedArray]]:
        """The mapped files of each folder by field; the shapes and types of their rows agree."""
        opened = [{field: _open(file) for field, file in named} for named in self.files]
        first = opened[0]
        for named, arrays in zip(self.files, opened, strict=True):
            folder = str(Path(named[0][1]).parent)
            if arrays.keys() != first.keys():
                raise FileError(folder, f"has the fields {list(arrays)}, and not {list(first)}.")
            for field, (file, _, rows, _) in arrays.items():
                like = first[field].rows
                if (rows.shape[1:], rows.dtype) != (like.shape[1:], like.dtype):
                    raise FileError(file, f"has {_row_text(rows)}, and not {_row_text(like)}.")
            names = dict(named) if len(opened) > 1 else {field: field for field in arrays}
            lengths = {names[field]: len(x.rows) for field, x in arrays.items()}
            if len(set(lengths.values())) > 1:
                raise UnequalLengthsError(lengths)
        return opened

    @functools.cached_property
    def _segments(self) -> Segments:
        return Segments([len(next(iter(arrays.values())).rows) for arrays in self._columns])

    @functools.cached_property
    def stored_spec(self) -> Spec:  # pyright: ignore[reportIncompatibleMethodOverride]
        return {
            field: jax.ShapeDtypeStruct(x.rows.shape[1:], x.rows.dtype)
            for field, x in self._columns[0].items()
        }

    def read(self, records: np.ndarray) -> Batch:
        batch = {
            field: empty_rows(len(records), x.shape, x.dtype)
            for field, x in self.stored_spec.items()
        }
        for i, where, inside in self._divided(records):
            for field, column in self._columns[i].items():
                to = batch[field]
                if isinstance(where, slice):
                    _copy(column, inside, to[where])
                else:
                    # Not `empty_rows`: these sizes differ at nearly every read.
                    rows = np.empty((len(inside), *to.shape[1:]), to.dtype)
                    _copy(column, inside, rows)
                    to[where] = rows
        return batch

    def _divided(self, records: np.ndarray) -> Iterator[tuple[int, slice | np.ndarray, np.ndarray]]:
        """`Segments.divide`, with a slice where the positions in the batch are consecutive."""
        if len(self.files) == 1:
            yield 0, slice(None), records
            return
        for i, rows, inside in self._segments.divide(records):
            first, count = int(rows[0]), len(rows)
            in_a_row = int(rows[-1]) == first + count - 1
            yield i, slice(first, first + count) if in_a_row else rows, inside

    def place(self, record: int) -> str:
        return ", ".join(file for _, file in self.files[self._segments.segment_of(record)])


def _row_text(rows: np.ndarray) -> str:
    return f"rows {type_text(jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype))}"


def _copy(column: _MappedArray, records: np.ndarray, to: np.ndarray) -> None:
    """Copies the rows `records` of a mapped file into `to`."""
    file, view, rows, end = column
    first, count = int(records[0]), len(records)
    if view is not None:
        check_uncut(file, view.size(), end)
    if not (rows.flags.c_contiguous and rows.flags.aligned):
        # `np.take` would first copy the whole file into a contiguous array.
        to[...] = rows[records]
    elif rows.nbytes < PAGE * len(rows) and _are_in_a_row(records):
        np.copyto(to, rows[first : first + count])
    else:
        # Every record is in range. With mode="raise", `np.take` would fill a second buffer first.
        np.take(rows, records, axis=0, out=to, mode="clip")


def _are_in_a_row(records: np.ndarray) -> bool:
    first, count = int(records[0]), len(records)
    if int(records[-1]) != first + count - 1:
        return False
    return bool((records == np.arange(first, first + count, dtype=records.dtype)).all())


def _files(path: Path) -> tuple[tuple[str, str], ...]:
    """The pairs of a field and its file that a path holds, sorted by name."""
    if path.is_dir():
        found = tuple((file.stem, str(file.absolute())) for file in sorted(path.glob("*.npy")))
        if not found:
            raise EmptySourceError(f"the folder {str(path)!r}, without a .npy file,")
        return found
    return (("data", str(path.absolute())),)


def _open(path: str) -> _MappedArray:
    """Maps a file and checks its header and size; reads no row."""
    try:
        file = open(path, "rb")  # noqa: SIM115  (only the `open` belongs into the `try`)
    except OSError as error:
        raise unopened(path, error) from error
    with file:
        shape, fortran, dtype = _header(file, path)
        if not shape or any(not isinstance(n, int) or n < 0 for n in shape):
            raise FileError(path, f"must hold an array with one row a record, got shape {shape}.")
        need_held_type(Path(path).stem, dtype)
        start = file.tell()
        end = start + math.prod(shape) * dtype.itemsize
        size = os.fstat(file.fileno()).st_size
        if size < end:
            raise FileError(
                path, f"is cut short: it holds {size} bytes and its header asks for {end}."
            )
        if end == start:
            return _MappedArray(path, None, np.empty(shape, dtype), end)
        try:
            view = mmap.mmap(file.fileno(), end, access=mmap.ACCESS_READ)
        except OSError as error:
            raise unopened(path, error) from error
    flat = np.frombuffer(view, dtype, math.prod(shape), start)
    return _MappedArray(path, view, flat.reshape(shape, order="F" if fortran else "C"), end)


def _header(file: BinaryIO, path: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    npy = np.lib.format
    try:
        version = npy.read_magic(file)
        if version == (1, 0):
            return npy.read_array_header_1_0(file)
        if version == (2, 0):
            return npy.read_array_header_2_0(file)
    except Exception as error:  # NumPy's parser raises many types for a broken header
        raise FileError(path, f"has no header of a .npy file: {error}") from error
    raise FileError(path, f"is of .npy version {version}, which holds only structured arrays.")
