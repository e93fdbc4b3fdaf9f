"""Columns in Parquet and Arrow files."""

import abc
import collections
import dataclasses
import functools
import itertools
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np
from flax import nnx

from .._extras import require
from .._types import Batch, Spec, expect, integer, names, spec_text
from ..errors import EmptySourceError, FieldTypeError, FileError, ReadError
from ._buffers import empty_rows
from ._conform import first_readable, spec_of, stack
from ._host import HostSource, HostSourceConfig
from ._reader import Reader, while_running
from ._storage import Segments, Stamp, check_uncut, paths_of, stamp, unopened
from ._values import as_record, need_held_type

Fields: TypeAlias = dict[str, np.ndarray]

Number: TypeAlias = bool | int | float | np.bool_ | np.integer | np.floating

Fill: TypeAlias = tuple[tuple[str, Number], ...]
"""Values for the nulls of columns, by column name: a mapping as a hashable tuple."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrowSourceConfig(HostSourceConfig):
    """Which files an `ArrowSource` reads; `HostSourceConfig` has the other options.

    pyarrow decodes a Parquet row group as a whole, even for a single row. So shuffle Parquet with
    `shuffle="blocks"`, a `block_size` near the rows of a group, and `window` below `cached_chunks`.

    Args:
        paths: a `.parquet` or `.arrow` file, a folder of them, or several files, read as one.
        columns: the columns to read; None reads all.
        decode: a function from a row, a dict of Python values, to a dict of arrays: for columns of
            strings or of encoded images. Without it each column becomes a field.
        fill: values for nulls by column name; they also replace nulls within the column's lists. A
            row with any other null, or with a null in place of a list, is unreadable.
        cached_chunks: the number of decoded row groups, or record batches, that stay in memory. The
            least recently used one is dropped first.
    """

    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
    columns: Sequence[str] | None = None
    decode: Callable[[dict[str, Any]], Any] | None = None
    fill: Mapping[str, Number] | Fill = ()
    cached_chunks: int = 32

    def __post_init__(self):
        super().__post_init__()
        if integer(self.cached_chunks, 0) < 1:
            raise ValueError(f"`cached_chunks` is at least 1, got {self.cached_chunks!r}.")
        if self.decode is not None and not callable(self.decode):
            raise ValueError(f"`decode` is a function of a row, got {self.decode!r}.")
        if not isinstance(self.fill, Mapping | tuple):
            raise ValueError(f"`fill` is a dict of values by column, got {self.fill!r}.")
        if self.fill and self.decode is not None:
            raise ValueError("`fill` has no effect on `decode`, which gets a null as None.")
        for name, value in (fill := dict(self.fill)).items():
            if not isinstance(value, Number):
                raise ValueError(f"`fill` has {value!r} for {name!r}, which is no number.")
        object.__setattr__(self, "fill", tuple(fill.items()))


class ArrowSource(HostSource):
    """Rows of Parquet files, and of memory-mapped Arrow files (extra "arrow").

    Without `decode`, a column must hold numbers, booleans, or lists or tensors of them, all of one
    shape. The most common length of a list in the first row group, or record batch, where the
    column is not null sets its shape. A row with a list of another length, or with a null that
    `fill` does not replace, is unreadable. Page checksums of Parquet are verified where a file has
    them.
    """

    def __init__(self, config: ArrowSourceConfig, *, rngs: nnx.Rngs | None = None):
        expect("config", config, ArrowSourceConfig)
        columns = names("columns", config.columns)
        paths = _paths(config.paths)
        stamps = tuple(map(stamp, paths))
        if config.decode is None:
            fill = tuple(dict(config.fill).items())
            for name, _ in fill:
                if columns is not None and name not in columns:
                    raise ValueError(
                        f"`fill` has a value for {name!r}, which `columns` leaves out."
                    )
            reader = ColumnReader(paths, stamps, columns, config.cached_chunks, fill)
        else:
            reader = RowReader(paths, stamps, columns, config.cached_chunks, config.decode)
        super().__init__(reader, config, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class _ChunkReader(Reader):
    """Reads by chunk: a Parquet row group or an Arrow record batch."""

    label = "ArrowSource"

    paths: tuple[str, ...]
    stamps: tuple[Stamp, ...]
    columns: tuple[str, ...] | None
    cached_chunks: int

    @functools.cached_property
    def _chunks(self) -> list["_FileChunk"]:
        chunks = [chunk for path in self.paths for chunk in _chunks(path, self.columns)]
        return [chunk for chunk in chunks if chunk.rows]

    @functools.cached_property
    def _segments(self) -> Segments:
        return Segments([chunk.rows for chunk in self._chunks])

    @functools.cached_property
    def _cache(self) -> "_Cache":
        return _Cache(self.cached_chunks)

    def __len__(self) -> int:
        return len(self._segments)

    def rows_and_holes(
        self, records: np.ndarray, spec: Spec
    ) -> tuple[Batch, np.ndarray, list[ReadError]]:
        # A damaged chunk is decoded twice for a batch, not once more for each of its rows.
        self._cache.local.failures = collections.defaultdict(list)
        try:
            return super().rows_and_holes(records, spec)
        finally:
            del self._cache.local.failures

    def place(self, record: int) -> str:
        return self._chunks[self._segments.segment_of(record)].path

    def _by_chunk(
        self, records: np.ndarray, load: Callable[["_FileChunk"], T]
    ) -> Iterator[tuple[T, np.ndarray, np.ndarray]]:
        """For each chunk that holds some of the records: what `load` returns for it, the positions
        of these records in `records`, and their rows in the chunk."""
        versions: dict[str, Stamp] = {}  # so that each file is checked once per read
        for i, rows, inside in self._segments.divide(records):
            chunk = self._chunks[i]
            if chunk.path not in versions:
                versions[chunk.path] = chunk.version
            yield self._cache.get(chunk, versions[chunk.path], load), rows, inside


@dataclasses.dataclass(frozen=True)
class ColumnReader(_ChunkReader):
    """Numeric columns; each becomes a field."""

    fill: Fill = dataclasses.field(compare=False)
    _fill_text: str = dataclasses.field(init=False)  # compared for `fill`, since 0.0 == -0.0

    def __post_init__(self):
        object.__setattr__(self, "_fill_text", repr(self.fill))

    @functools.cached_property
    def stored_spec(self) -> Spec:  # pyright: ignore[reportIncompatibleMethodOverride]
        chunks = self._chunks
        schema = chunks[0].schema
        for name, _ in self.fill:
            if name not in schema.names:
                raise FileError(
                    chunks[0].path,
                    f"has no column {name!r}, for which `fill` has a value, only {schema.names}.",
                )
        for field in schema:  # find types that JAX cannot hold without reading a row
            fill = dict(self.fill).get(field.name)
            values, _ = _array(field.name, _no_rows(field.type), (), fill)
            if fill is not None:
                _check_held(field.name, fill, values.dtype)

        def look(i: int) -> tuple[Fields, Fields]:
            version = chunks[i].version
            return self._cache.get(chunks[i], version, lambda x: self._columns(x.table(None)))

        first = first_readable(look, len(chunks))

        errors = []

        def others() -> Iterator[tuple[Fields, Fields]]:
            for chunk in chunks:
                try:
                    columns = self._columns(chunk.table(list(first[0])))
                except Exception as error:  # another chunk may show the shape
                    errors.append(error)
                else:
                    yield columns

        spec = spec_of_columns(itertools.chain([first], others()))
        if errors and any(0 in x.shape for x in spec.values()):
            raise errors[0]
        _check_schemas(chunks, spec)
        return spec

    def _columns(self, table: Any, spec: Spec | None = None) -> tuple[Fields, Fields]:
        return columns_of(table, spec, dict(self.fill))

    def read(self, records: np.ndarray) -> Batch:
        spec = self.stored_spec
        batch = {name: empty_rows(len(records), x.shape, x.dtype) for name, x in spec.items()}

        def load(chunk: _FileChunk) -> tuple[Fields, Fields]:
            # Only the columns of the first file: another may have more, of types JAX cannot hold.
            return self._columns(chunk.table(list(spec)), spec)

        for (fields, holes), rows, inside in self._by_chunk(records, load):
            for name, target in batch.items():
                if name in holes and holes[name][inside].any():
                    raise hole(name)
                target[rows] = fields[name][inside]
        return batch


@dataclasses.dataclass(frozen=True)
class RowReader(_ChunkReader):
    """Rows of any columns, passed through a function that returns records."""

    decode: Callable[[dict[str, Any]], Any]

    @functools.cached_property
    def stored_spec(self) -> Spec:  # pyright: ignore[reportIncompatibleMethodOverride]
        _check_schemas(self._chunks, None)
        return first_readable(lambda i: spec_of(self._decoded(np.array([i]))[0]), len(self))

    def read(self, records: np.ndarray) -> Batch:
        return stack(self._decoded(records))

    def _decoded(self, records: np.ndarray) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = [{}] * len(records)
        for table, rows, inside in self._by_chunk(records, lambda x: x.table(self.columns)):
            taken = zip(rows, _python_rows(table, inside), strict=True)
            for row, values in while_running(taken):
                found[row] = as_record(self.decode(values), None)
        return found


def _python_rows(table: Any, inside: np.ndarray) -> list[dict[str, Any]]:
    try:
        return table.take(inside).to_pylist()
    except require("pyarrow", "arrow").ArrowNotImplementedError:  # `take` of view types, say
        return [row for i in inside.tolist() for row in table.slice(i, 1).to_pylist()]


class _FileChunk(abc.ABC):
    """Rows of a file that are decoded together."""

    path: str
    rows: int

    @property
    @abc.abstractmethod
    def schema(self) -> Any:
        """The Arrow schema of the columns that are read."""

    @abc.abstractmethod
    def table(self, columns: Sequence[str] | None) -> Any:
        """The rows of `columns`; None stands for all columns that are read."""

    @property
    def version(self) -> Stamp:
        """The version of the file's bytes; a cached chunk of another version is decoded again."""
        return None


@dataclasses.dataclass(frozen=True)
class _RowGroup(_FileChunk):
    path: str
    rows: int
    group: int
    columns: tuple[str, ...] | None
    metadata: Any
    stamp: Stamp

    @property
    def schema(self) -> Any:
        return _selected(self.metadata.schema.to_arrow_schema(), self.columns)

    def table(self, columns: Sequence[str] | None) -> Any:
        names = self.columns if columns is None else columns
        names = None if names is None else list(names)
        if stamp(self.path) != self.stamp:  # the known metadata would not describe another file
            raise OSError(f"{self.path} was replaced or changed after it was opened")
        # A ParquetFile is not thread-safe; opening one with known metadata is cheap.
        with _parquet(self.path, self.metadata) as file:
            table = file.read_row_group(self.group, columns=names, use_threads=False)
        if table.num_rows != self.rows:
            raise OSError(f"a row group of {self.path} has {table.num_rows} rows, not {self.rows}")
        # For "a.b" pyarrow also reads the child `b` of a struct `a`.
        return table if names is None else table.select(names)


@dataclasses.dataclass(frozen=True)
class _RecordBatch(_FileChunk):
    """A record batch in a memory map of a file, which must keep `end` bytes.

    Its version is that of the file under the path, if the map is still of that file: bytes that
    are overwritten in place show in the map.
    """

    path: str
    rows: int
    map: mmap.mmap
    end: int
    inode: int
    batch: Any

    @property
    def schema(self) -> Any:
        return self.batch.schema

    def table(self, columns: Sequence[str] | None) -> Any:
        self.batch.validate(full=True)
        return self.batch if columns is None else self.batch.select(list(columns))

    @property
    def version(self) -> Stamp:
        check_uncut(self.path, self.map.size(), self.end)
        found = stamp(self.path)
        return found if found is not None and found[0] == self.inode else None


class _Cache:
    """An LRU cache of loaded chunks. It holds no lock while loading, so two threads may both load a
    chunk; that costs less than to wait."""

    def __init__(self, size: int):
        self._size, self._lock = size, threading.Lock()
        self._kept: collections.OrderedDict[int, tuple[Stamp, Any]] = collections.OrderedDict()
        self.local = threading.local()
        """In a thread that masks, `failures` lists the errors of each chunk that did not load."""

    def get(self, chunk: _FileChunk, version: Stamp, load: Callable[[_FileChunk], T]) -> T:
        with self._lock:
            known, found = self._kept.get(id(chunk), (None, None))
            if found is not None and known == version:
                self._kept.move_to_end(id(chunk))
                return found
        failures = getattr(self.local, "failures", {}).get(id(chunk), ())
        if len(failures) > 1:
            error, traceback = failures[-1]
            raise error.with_traceback(traceback)  # each `raise` lengthens it
        try:
            found = load(chunk)
        except Exception as error:
            if hasattr(self.local, "failures"):
                self.local.failures[id(chunk)].append((error, error.__traceback__))
            raise
        with self._lock:
            self._kept[id(chunk)] = version, found
            while len(self._kept) > self._size:
                self._kept.popitem(last=False)
        return found


def _paths(given: Any) -> tuple[str, ...]:
    paths = paths_of("paths", given)
    if isinstance(given, str | os.PathLike) and (folder := paths[0]).is_dir():
        paths = sorted(x for x in folder.iterdir() if x.suffix in (".parquet", ".arrow"))
        if not paths:
            raise EmptySourceError(f"the folder {str(folder)!r}, without .parquet or .arrow files,")
    return tuple(str(path.absolute()) for path in paths)


def _chunks(path: str, columns: tuple[str, ...] | None) -> list[_FileChunk]:
    pa = require("pyarrow", "arrow")
    try:
        if path.endswith(".parquet"):
            found = stamp(path)
            with _parquet(path, None) as file:
                metadata = file.metadata
                _check_columns(path, columns, file.schema_arrow.names)
                rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
                if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows:
                    raise FileError(
                        path,
                        f"is damaged: it says that it has {metadata.num_rows} rows, and row groups "
                        f"of {sum(rows)} together.",
                    )
                return [_RowGroup(path, n, i, columns, metadata, found) for i, n in enumerate(rows)]
        with open(path, "rb") as file:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            inode = os.fstat(file.fileno()).st_ino
        source = pa.BufferReader(pa.py_buffer(view))
        try:
            reader = pa.ipc.open_file(source)
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except pa.ArrowInvalid:
            source.seek(0)
            reader = pa.ipc.open_stream(source)
            batches = list(reader)
            check_ended(path)
        _check_columns(path, columns, reader.schema.names)
        if columns is not None:
            batches = [batch.select(list(columns)) for batch in batches]
        return [_RecordBatch(path, x.num_rows, view, len(view), inode, x) for x in batches]
    except FileError:  # of a column that is missing
        raise
    except OSError as error:  # pa.ArrowInvalid is one of ValueError
        raise unopened(path, error) from error
    except (pa.ArrowException, ValueError) as error:
        raise FileError(path, f"is no file of its kind, or a damaged one: {error}") from error


def check_ended(path: str) -> None:
    """Raises for an Arrow file without an end mark, of a stream or of a file: it may be truncated.

    pyarrow reads a stream that was cut between two record batches without an error.
    """
    with open(path, "rb") as file:
        begin = file.read(4)
        file.seek(-min(8, os.fstat(file.fileno()).st_size), os.SEEK_END)
        end = file.read()
    mark = END_OF_STREAM if begin == END_OF_STREAM[:4] else END_OF_STREAM[4:]  # before Arrow 0.15
    if not end.endswith((mark, END_OF_FILE)):
        raise FileError(
            path,
            "ends without the mark of an Arrow stream's end: it is cut, or its writer was not "
            "closed. Write it again.",
        )


END_OF_STREAM, END_OF_FILE = b"\xff\xff\xff\xff\0\0\0\0", b"ARROW1"
"""See "IPC Streaming Format" and "IPC File Format" in the Arrow columnar format specification."""


def _parquet(path: str, metadata: Any) -> Any:
    parquet = require("pyarrow.parquet", "arrow")
    return parquet.ParquetFile(
        path, metadata=metadata, page_checksum_verification=True, pre_buffer=False
    )


def _check_columns(path: str, columns: tuple[str, ...] | None, names: Sequence[str]) -> None:
    for name in columns or ():
        if name not in names:
            raise FileError(path, f"has no column {name!r}, only {list(names)}.")
    for name in names if columns is None else columns:
        if names.count(name) > 1:
            raise FileError(
                path,
                f"has several columns {name!r}. Give each a name of its own, or choose others.",
            )


def _selected(schema: Any, columns: tuple[str, ...] | None) -> Any:
    if columns is None:
        return schema
    return require("pyarrow", "arrow").schema([schema.field(name) for name in columns])


def _check_schemas(chunks: Sequence[_FileChunk], spec: Spec | None) -> None:
    """Raises unless each file has the columns of `spec` with its shapes and types.

    Without `spec`, each must have the columns of the first file, of any type.
    """
    first = chunks[0].schema
    for path, here in itertools.groupby(chunks, lambda chunk: chunk.path):
        schema = next(here).schema
        if schema.equals(first):
            continue
        for name in first.names if spec is None else spec:
            if name not in schema.names:
                raise FileError(
                    path, f"has no column {name!r}, which the first file has, only {schema.names}."
                )
            if spec is None:
                continue
            kind = schema.field(name).type
            try:
                values, _ = _array(name, _no_rows(kind), spec[name].shape)
            except FieldTypeError as error:
                raise FileError(
                    path,
                    f"has the column {name} of the Arrow type {kind}, which in the first file is "
                    f"{spec_text({name: spec[name]})}.",
                ) from error
            found = jax.ShapeDtypeStruct(values.shape[1:], values.dtype)
            if found != spec[name]:
                raise FileError(
                    path,
                    f"has the column {spec_text({name: found})}, which in the first file is "
                    f"{spec_text({name: spec[name]})}.",
                )


def columns_of(
    table: Any, spec: Spec | None = None, fill: Mapping[str, Number] = MappingProxyType({})
) -> tuple[Fields, Fields]:
    """Columns of a table or record batch as NumPy arrays, and their holes.

    The arrays are views where Arrow allows it. `spec` selects the columns, by default all. The
    holes of a column, if it has any, are a mask of the unusable rows: nulls that `fill` does not
    replace, and lists whose length is not that of `spec` (without `spec`, the most common one).
    """
    fields, holes = {}, {}
    for name in table.schema.names if spec is None else spec:
        column = table.column(name)
        if hasattr(column, "combine_chunks"):
            column = column.combine_chunks()
        if hasattr(column, "num_chunks"):
            column = column.chunk(0)
        shape = () if spec is None else spec[name].shape
        fields[name], missing = _array(name, column, shape, fill.get(name))
        if missing is not None:
            holes[name] = missing
    return fields, holes


def spec_of_columns(decoded: Iterable[tuple[Fields, Fields]]) -> Spec:
    """The spec of columns, from the results of `columns_of` for one table after another.

    Stops at the first table in which every list column has had a usable row; such a row sets the
    shape of its column.
    """
    spec, unknown = {}, None
    for fields, holes in decoded:
        for name in fields if unknown is None else unknown & fields.keys():
            spec[name] = jax.ShapeDtypeStruct(fields[name].shape[1:], fields[name].dtype)
        known = {name for name, x in spec.items() if not (x.shape and np.all(holes.get(name, 0)))}
        unknown = spec.keys() - known if unknown is None else unknown - known
        if not unknown:
            break
    return spec


def hole(name: str) -> ValueError:
    """The error for a row that `columns_of` calls a hole."""
    return ValueError(
        f"column {name!r} is null there, holds a null, or is a list of another length than others, "
        "and a field has one shape and no nulls: leave the column out, or let ArrowSource give its "
        "nulls a value (`fill`) or read the rows with a function (`decode`)"
    )


def _array(
    name: str, column: Any, shape: tuple[int, ...], fill: Number | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """The rows of an Arrow array, and a mask of the holes, or None if there are none.

    `shape` is the shape of a row if it is known. With `fill`, only lists can be holes.
    """
    pa = require("pyarrow", "arrow")
    kind = column.type
    if isinstance(kind, pa.FixedShapeTensorType):
        values, holes = _array(name, column.storage, (), fill)
        axes = kind.permutation or range(len(kind.shape))
        values = values.reshape(len(column), *kind.shape)
        return values.transpose(0, *(1 + axis for axis in axes)), holes
    if isinstance(kind, pa.Bool8Type):
        values, holes = _array(name, column.storage, shape, fill)
        return values != 0, holes
    if isinstance(kind, pa.BaseExtensionType):
        return _array(name, column.storage, shape, fill)
    null = column.is_null().to_numpy(zero_copy_only=False) if column.null_count else None
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        filled = _scalar(name, 0 if fill is None else fill, kind)
        values = column if null is None else column.fill_null(filled)
        return values.to_numpy(zero_copy_only=False), null if fill is None else None
    if pa.types.is_fixed_size_list(kind):
        width = kind.list_size
        lengths = np.full(len(column), width)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lengths = np.diff(column.offsets.to_numpy())
        known = lengths if null is None else lengths[~null]
        # The most common length: the first list may be the one that was cut short.
        width = shape[0] if shape else int(np.bincount(known).argmax()) if len(known) else 0
    else:
        raise FieldTypeError(
            name,
            f"has the Arrow type {kind}, which JAX cannot hold. Leave the column out, or decode "
            "it: `decode` of an ArrowSource does, and a RandomAccessSource takes any object that "
            "gives its records by number.",
        )
    good = (lengths == width) if null is None else (lengths == width) & ~null
    whole = bool(good.all())
    inner = (column if whole else column.filter(pa.array(good))).flatten()
    values, missing = _array(name, inner, shape[1:], fill)
    values = values.reshape(np.count_nonzero(good), width, *values.shape[1:])
    if missing is not None:
        missing = np.logical_or.reduce(missing.reshape(values.shape[:2]), axis=1)
    if whole:
        return values, missing
    rows, holes = np.zeros((len(column), *values.shape[1:]), values.dtype), ~good
    rows[good] = values
    if missing is not None:
        holes[good] = missing
    return rows, holes


def _no_rows(kind: Any) -> Any:
    """An empty Arrow array of type `kind`; `pa.array([], kind)` fails for some tensor types."""
    return require("pyarrow", "arrow").nulls(0, kind)


def _scalar(name: str, value: Number, kind: Any) -> Any:
    """The value as an Arrow scalar; raises if the type cannot hold it.

    `pa.scalar` alone would turn 1.5 into the integer 1, and 1e300 into the float32 infinity.
    """
    held = _as_type(value, np.dtype(kind.to_pandas_dtype()))
    if held is None:
        raise FieldTypeError(
            name, f"has the Arrow type {kind}, which cannot hold `fill`: {value!r}."
        )
    return require("pyarrow", "arrow").scalar(held, kind)


def _check_held(name: str, value: Number, dtype: np.dtype) -> None:
    target = need_held_type(name, dtype)
    if _as_type(value, target) is None:
        raise FieldTypeError(
            name,
            f"has type {dtype} and JAX would hold it as {target}, which cannot hold `fill`: "
            f"{value!r}. Fill with another value, or turn on jax_enable_x64 before.",
        )


def _as_type(value: Number, target: np.dtype) -> Any:
    """The value in the type `target`, where floats may be rounded; None if it does not fit."""
    given = np.asarray(value)
    if given.dtype == object:  # an integer beyond 64 bits
        return None
    with np.errstate(all="ignore"):
        held = given.astype(target)
    same = np.isfinite(held) == np.isfinite(given) if target.kind == "f" else held == given
    return held[()] if same else None
