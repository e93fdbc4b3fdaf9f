"""TensorFlow Datasets that were prepared as ArrayRecord files; read without TensorFlow."""

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from .._extras import require
from .._types import expect, names
from ..errors import EmptySourceError, FieldTypeError, FileError
from ._array_record import FileSlice, SliceReader
from ._host import HostSource, HostSourceConfig
from ._iterable import Stream, StreamSource, StreamSourceConfig
from ._reader import Reader
from ._storage import Stamp, stamp
from ._values import as_array

ROWS = 256
"""Rows that a stream reads at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TFDSEagerSourceConfig(HostSourceConfig):
    """What a `TFDSEagerSource` reads; `HostSourceConfig` has the other options.

    Args:
        path: the folder of a version prepared as ArrayRecord, such as `.../mnist/3.0.1`.
        split: the split to read, or a slice of one, such as "train[:80%]".
        fields: the features to read; None reads all. Features of strings must be left out.
    """

    path: str | os.PathLike[str]
    split: str = "train"
    fields: Sequence[str] | None = None


class TFDSEagerSource(HostSource):
    """A split of a prepared TensorFlow data set, by random access (extra "tfds").

    It does not import TensorFlow.

    Raises:
        FileError: the folder holds no data set prepared as ArrayRecord, or a file is missing.
        EmptySourceError: the split has no examples.
    """

    def __init__(self, config: TFDSEagerSourceConfig, *, rngs: nnx.Rngs | None = None):
        expect("config", config, TFDSEagerSourceConfig)
        super().__init__(tfds_reader(config, "TFDSEagerSource"), config, rngs=rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TFDSStreamingSourceConfig(StreamSourceConfig):
    """What a `TFDSStreamingSource` reads; `StreamSourceConfig` has the other options.

    Args:
        path: the folder of a version prepared as ArrayRecord, such as `.../mnist/3.0.1`.
        split: the split to read, or a slice of one, such as "train[:80%]".
        fields: the features to read; None reads all. Features of strings must be left out.
    """

    path: str | os.PathLike[str]
    split: str = "train"
    fields: Sequence[str] | None = None


class TFDSStreamingSource(StreamSource):
    """A split of a prepared data set as a stream; each epoch is a pass over it (extra "tfds")."""

    def __init__(self, config: TFDSStreamingSourceConfig, *, rngs: nnx.Rngs | None = None):
        expect("config", config, TFDSStreamingSourceConfig)
        stream = ReaderStream(tfds_reader(config, "TFDSStreamingSource"))
        super().__init__(stream, config, rngs=rngs)


class ReaderStream(Stream):
    """The rows of a reader in stored order."""

    def __init__(self, reader: Reader):
        self.reader, self.label = reader, reader.label

    def begin(self, epoch: int, skip: int) -> Iterator[dict[str, Any]]:
        del epoch
        for start in range(skip, len(self.reader), ROWS):
            records = np.arange(start, min(start + ROWS, len(self.reader)))
            try:
                batches = [self.reader.read(records)]
            except Exception:  # read one by one, so that the rows before the damaged one are given
                batches = map(self.reader.read, records[:, None])
            for batch in batches:
                for i in range(len(jax.tree.leaves(batch)[0])):
                    yield jax.tree.map(lambda x, i=i: x[i], batch)


def tfds_reader(config: Any, label: str) -> SliceReader:
    """The reader of the split that `config` names."""
    expect("split", config.split, str)
    path, fields = os.path.abspath(config.path), names("fields", config.fields)
    stamps = _stamps(path)
    info = _prepared(path, stamps)
    if info.file_format.value != "array_record":
        raise FileError(
            path,
            f"is prepared as {info.file_format.value}, which takes TensorFlow to read. Prepare it "
            'with file_format="array_record".',
        )
    for name in fields or ():
        if name not in info.features:
            raise FieldTypeError(name, f"is no feature of {path}, only {list(info.features)} are.")
    chosen, slices = info.splits[config.split], []
    if chosen.num_examples < 1:  # TFDS gives wrong instructions for a slice that is empty
        raise EmptySourceError(f"the split {config.split!r} of {path}")
    for x in chosen.file_instructions:
        file, take = os.fspath(x.filename), x.take if x.take >= 0 else x.examples_in_shard - x.skip
        if (found := stamp(file)) is None:
            raise FileError(file, "is a shard of a prepared data set, and is missing.")
        slices.append(FileSlice(file, found, x.skip, take))
    return SliceReader(tuple(slices), TfdsDecoder(path, stamps, fields), label)


@dataclasses.dataclass(frozen=True)
class TfdsDecoder:
    """Decodes serialized examples of the data set in the folder `path`."""

    path: str
    stamps: tuple[Stamp, ...]
    fields: tuple[str, ...] | None

    def __call__(self, raw: bytes) -> dict[str, Any]:
        features, types = _features(self.path, self.stamps)
        record = features.deserialize_example_np(raw)
        chosen = record if self.fields is None else self.fields
        return {name: _typed(name, record[name], types[name]) for name in chosen}


def _typed(name: str, value: Any, kind: Any) -> Any:
    """A feature in its declared type: TFDS decodes scalars to Python numbers."""
    if isinstance(value, dict):
        return {inner: _typed(f"{name}.{inner}", x, kind[inner]) for inner, x in value.items()}
    return value if np.dtype(kind) == object else np.asarray(as_array(name, value), kind)


@functools.lru_cache(maxsize=8)
def _features(path: str, stamps: tuple[Stamp, ...]) -> tuple[Any, Any]:
    """The features of the data set in a folder, and their NumPy types."""
    features = _prepared(path, stamps).features
    return features, features.np_dtype


@functools.lru_cache(maxsize=8)
def _prepared(path: str, stamps: tuple[Stamp, ...]) -> Any:
    """The `DatasetInfo` of a folder. The stamps are part of the cache key only."""
    del stamps
    tfds = require("tensorflow_datasets", "tfds")
    if not os.path.exists(os.path.join(path, "dataset_info.json")):
        raise FileError(path, "is no folder of a prepared data set: it has no dataset_info.json.")
    try:
        return tfds.builder_from_directory(path).info
    except Exception as error:  # from the JSON parser and others
        raise FileError(path, f"holds no prepared data set, or a damaged one: {error}") from error


def _stamps(path: str) -> tuple[Stamp, ...]:
    return tuple(stamp(os.path.join(path, name)) for name in ("dataset_info.json", "features.json"))
