"""Hugging Face data sets as sources (package `datasets`)."""

import dataclasses
import functools
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from flax import nnx

from .._extras import require
from .._types import Batch, Spec, expect, names
from ..errors import EmptySourceError, FileError
from ._arrow import check_ended, columns_of, hole, spec_of_columns
from ._host import HostSource, HostSourceConfig
from ._iterable import Stream, StreamSource, StreamSourceConfig
from ._reader import Reader
from ._storage import MappedFiles

LOG = logging.getLogger("datarax")

ROWS = 256
"""Rows that are decoded at a time in a stream, and to find the spec of any data set."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HFEagerSourceConfig(HostSourceConfig):
    """What an `HFEagerSource` reads; `HostSourceConfig` has the other options.

    Args:
        path: a folder written by `Dataset.save_to_disk`, or a name for `datasets.load_dataset`.
            None if the source gets the data set itself.
        split: the split to read, such as "train".
        fields: the columns to read; None reads all. Columns of strings must be left out.
    """

    path: str | os.PathLike[str] | None = None
    split: str | None = None
    fields: Sequence[str] | None = None


class HFEagerSource(HostSource):
    """A `datasets.Dataset` by random access (extra "hf").

    Its Arrow files stay on disk. It reads the columns that the data set's format selects, in their
    stored types. A data set with a transform is a `ValueError`.

    Args:
        config: the path, unless `dataset` is given, and the split, fields and order.
        dataset: a `datasets.Dataset`, or a `DatasetDict` of splits.
        rngs: the seed of the shuffle. Without it the source uses the pipeline's seed.
    """

    def __init__(
        self, config: HFEagerSourceConfig, dataset: Any = None, *, rngs: nnx.Rngs | None = None
    ):
        expect("config", config, HFEagerSourceConfig)
        dataset = load(config, dataset, streaming=False)
        super().__init__(HFReader(dataset), config, rngs=rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HFStreamingSourceConfig(StreamSourceConfig):
    """What an `HFStreamingSource` reads; `StreamSourceConfig` has the other options.

    Args:
        path: as in `HFEagerSourceConfig`. A data set loaded by name is streamed, not downloaded.
        split: the split to read, such as "train".
        fields: the columns to read; None reads all. Columns of strings must be left out.
    """

    path: str | os.PathLike[str] | None = None
    split: str | None = None
    fields: Sequence[str] | None = None


class HFStreamingSource(StreamSource):
    """A `datasets.IterableDataset`; each epoch is a pass over it (extra "hf").

    Each pass calls `set_epoch`, so a data set that shuffles has a new order in every epoch.

    Args:
        config: the path, unless `dataset` is given, and the split, fields and windows.
        dataset: a `datasets.IterableDataset` or `Dataset`, or a dict of splits.
        rngs: the seed of the shuffle. Without it the source uses the pipeline's seed.
    """

    def __init__(
        self,
        config: HFStreamingSourceConfig,
        dataset: Any = None,
        *,
        rngs: nnx.Rngs | None = None,
    ):
        expect("config", config, HFStreamingSourceConfig)
        dataset = load(config, dataset, streaming=True)
        files = files_of(dataset)
        if hasattr(dataset, "to_iterable_dataset"):
            if len(dataset) == 0:  # an empty data set has no shards to stream
                raise EmptySourceError("HFStreamingSource")
            dataset = dataset.to_iterable_dataset()
        super().__init__(HFStream(dataset, files), config, rngs=rngs)


class HFStream(Stream):
    """Passes over an `IterableDataset`."""

    label = "HFStreamingSource"

    def __init__(self, dataset: Any, files: Sequence[str]):
        self.dataset = dataset
        self._files = MappedFiles(files)
        self._columns: Spec | None = None  # the spec of the first rows, which all others must have

    def begin(self, epoch: int, skip: int) -> Iterator[dict[str, Any]]:
        for chunk in self._chunks(epoch, skip):
            if self._columns is None:
                self._columns = spec_of_columns([columns_of(chunk)])
            fields, holes = columns_of(chunk, self._columns)
            for i in range(chunk.num_rows):
                for name, missing in holes.items():
                    if missing[i]:
                        raise hole(name)
                yield {name: np.array(x[i]) for name, x in fields.items()}

    def _chunks(self, epoch: int, skip: int) -> Iterator[Any]:
        """The rows of a pass in tables of `ROWS`. The rows of a table that cannot be read are read
        one by one, so that those before the damaged one are delivered."""
        size, passed = ROWS, 0
        while True:
            rest = self.dataset.with_format("arrow").skip(skip)
            rest.set_epoch(epoch)  # on `rest`, since derived data sets do not inherit the epoch
            chunks = rest.iter(batch_size=size)
            while size > 1 or skip < passed:
                try:
                    self._files.check()
                    chunk = next(chunks, None)
                except Exception as error:
                    # At interpreter shutdown, thread pools close first and raise this error.
                    if size == 1 or "new futures after" in str(error):
                        raise
                    LOG.warning(
                        "%s could not read rows %d to %d of epoch %d (%r) and reads them again, "
                        "one by one",
                        *(self.label, skip, skip + size - 1, epoch, error),
                    )
                    break
                if chunk is None:
                    return
                yield chunk
                skip += chunk.num_rows
            size, passed = (ROWS, 0) if size == 1 else (1, skip + ROWS)


@dataclasses.dataclass(frozen=True, eq=False)
class HFReader(Reader):
    """Reads the rows of a data set. It is compared by identity, as data sets are."""

    label = "HFEagerSource"

    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    @functools.cached_property
    def _arrow(self) -> Any:
        # Not "numpy": that format casts float64 to float32.
        return self.dataset.with_format("arrow")

    @functools.cached_property
    def _files(self) -> MappedFiles:
        return MappedFiles(files_of(self.dataset))

    @functools.cached_property
    def stored_spec(self) -> Spec:  # pyright: ignore[reportIncompatibleMethodOverride]
        starts = range(0, len(self), ROWS)
        return spec_of_columns(columns_of(self._rows(slice(i, i + ROWS))) for i in starts)

    def _rows(self, which: Any) -> Any:
        self._files.check()
        return self._arrow[which]

    def read(self, records: np.ndarray) -> Batch:
        fields, holes = columns_of(self._rows(records.astype(np.int64)), self.stored_spec)
        for name in holes:
            raise hole(name)
        # Copies, since a view would read the memory map later, when the file may be truncated.
        return {name: np.array(x) for name, x in fields.items()}

    def place(self, record: int) -> str:
        del record
        return ", ".join(files_of(self.dataset)) or "a data set in memory"


def files_of(dataset: Any) -> list[str]:
    """The paths of the files that a data set has memory-mapped."""
    return [x["filename"] for x in getattr(dataset, "cache_files", ())]


def load(config: Any, dataset: Any, streaming: bool) -> Any:
    """The given data set, or the one that `config` names; only the chosen split and fields."""
    datasets = require("datasets", "hf")
    if (dataset is None) == (config.path is None):
        raise ValueError("Give either a data set or `path` in the config, and not both.")
    split = config.split
    if dataset is None:
        path = os.fspath(config.path)
        if os.path.isdir(path):
            try:
                dataset = datasets.load_from_disk(path)
            except Exception as error:  # from `datasets`, pyarrow or the JSON parser
                raise FileError(path, f"holds no data set, or a damaged one: {error}") from error
        else:
            dataset = datasets.load_dataset(path, split=split, streaming=streaming)
            split = None
    if isinstance(dataset, dict):
        if split not in dataset:
            raise ValueError(f"`split` must be one of {list(dataset)}, got {split!r}.")
        dataset, split = dataset[split], None
    kinds = (datasets.Dataset, datasets.IterableDataset) if streaming else datasets.Dataset
    if not isinstance(dataset, kinds):
        raise TypeError(
            f"{'HFStreamingSource' if streaming else 'HFEagerSource'} takes a `datasets.Dataset`"
            f"{' or `IterableDataset`' if streaming else ''}, got {type(dataset).__name__}."
        )
    if split not in (None, str(dataset.split)):
        raise ValueError(
            f"`split` is {split!r}, but what is given is a single split"
            f"{'' if dataset.split is None else f', {str(dataset.split)!r}'}. "
            "Leave `split` out."
        )
    chosen = names("fields", config.fields)
    for path in files_of(dataset):
        if os.path.exists(path):
            check_ended(path)
    if isinstance(dataset, datasets.Dataset):
        if dataset.format["type"] == "custom":
            raise ValueError(
                "A transform of the data set (`with_transform`) would not be applied. Take its "
                "format off and make it a stage, or give the data set to RandomAccessSource."
            )
        shown = dataset.format["columns"]
        dataset = dataset.with_format(None).select_columns(shown)
    return dataset if chosen is None else dataset.select_columns(list(chosen))
