"""ArrayRecord files as a source."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flax import nnx

from .._extras import require
from .._types import Batch, Spec, expect
from ..errors import FileError
from ._codec import DECODERS, Decode
from ._conform import first_readable, spec_of, stack
from ._host import HostSource, HostSourceConfig
from ._reader import Reader, while_running
from ._storage import Segments, Stamp, paths_of, stamp, unopened
from ._values import as_record

RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayRecordSourceConfig(HostSourceConfig):
    """Which files an `ArrayRecordSource` reads; `HostSourceConfig` has the other options.

    Args:
        paths: a file, or several, read as one.
        decode: "msgpack" or "npz" for records written with `datarax.sources.encode`, or a function
            from the bytes of a record to a dict of arrays.
    """

    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
    decode: Decode = "msgpack"

    def __post_init__(self):
        super().__post_init__()
        if not callable(self.decode) and self.decode not in DECODERS:
            raise ValueError(
                f"`decode` is one of {sorted(DECODERS)} or a function of bytes, got "
                f"{self.decode!r}."
            )


class ArrayRecordSource(HostSource):
    """Records of ArrayRecord files, by random access (extra "array_record").

    Write the files with `group_size:1`: the format decodes a group as a whole. Its checksums are
    verified.

    Raises:
        FileError: a file is missing or damaged.
    """

    def __init__(self, config: ArrayRecordSourceConfig, *, rngs: nnx.Rngs | None = None):
        expect("config", config, ArrayRecordSourceConfig)
        decode = config.decode if callable(config.decode) else DECODERS[config.decode]
        names = [str(path.absolute()) for path in paths_of("paths", config.paths)]
        slices = tuple(FileSlice(name, stamp(name)) for name in names)
        super().__init__(SliceReader(slices, decode, "ArrayRecordSource"), config, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class FileSlice:
    """The records `skip` to `skip + take - 1` of a file; without `take`, all from `skip` on."""

    path: str
    stamp: Stamp
    skip: int = 0
    take: int | None = None

    @functools.cached_property
    def file(self) -> Any:
        module = require("array_record.python.array_record_module", "array_record")
        try:
            size = os.stat(self.path).st_size
            file = module.ArrayRecordReader(self.path, RANDOM_ACCESS)
            # A damaged file opens without an error and looks empty; only `ok` tells.
            if not file.ok():
                open(self.path, "rb").close()  # raises if the system cannot open it
                raise RuntimeError(f"of {size} bytes is no intact ArrayRecord file")
        except OSError as error:
            raise unopened(self.path, error) from error
        except RuntimeError as error:
            raise FileError(self.path, f"cannot be read: {error}.") from error
        if file.num_records() < self.skip + (self.take or 0):
            raise FileError(
                self.path,
                f"holds {file.num_records()} records and "
                f"should hold {self.skip + (self.take or 0)}.",
            )
        return file

    def __len__(self) -> int:
        return self.file.num_records() - self.skip if self.take is None else self.take

    def __getstate__(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class SliceReader(Reader):
    """Reads and decodes the records of several slices, one after another."""

    slices: tuple[FileSlice, ...]
    decode: Callable[[bytes], Any]
    label: str

    @functools.cached_property
    def _segments(self) -> Segments:
        return Segments([len(x) for x in self.slices])

    def __len__(self) -> int:
        return len(self._segments)

    @functools.cached_property
    def stored_spec(self) -> Spec:  # pyright: ignore[reportIncompatibleMethodOverride]
        return first_readable(
            lambda i: spec_of(self._decoded(self._raw(np.array([i]))[0])), len(self)
        )

    def read(self, records: np.ndarray) -> Batch:
        return stack([self._decoded(raw) for raw in while_running(self._raw(records))])

    def place(self, record: int) -> str:
        return self.slices[self._segments.segment_of(record)].path

    def _decoded(self, raw: bytes) -> dict[str, Any]:
        try:
            return as_record(self.decode(raw), None)
        except Exception as error:
            if self.decode not in DECODERS.values():
                raise
            raise ValueError(
                f"it is damaged, or `encode` has not written it in this form ({error}). For "
                "records of another format give `decode`, a function from the bytes of one to a "
                "dict of arrays"
            ) from error

    def _raw(self, records: np.ndarray) -> list[bytes]:
        found: list[bytes] = [b""] * len(records)
        for i, rows, inside in self._segments.divide(records):
            piece = self.slices[i]
            several = piece.file.read((inside + piece.skip).tolist())
            # Behind the end of a truncated file, the reader returns empty records.
            if not all(several) and stamp(piece.path) != piece.stamp:
                raise OSError(f"{piece.path} was replaced or changed after it was opened")
            for row, raw in zip(rows, several, strict=True):
                found[row] = raw
        return found
