"""Data sets of the package `datasets`."""

import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from .._types import Batch, Spec
from ._arrow import columns_of
from ._host import HostSource, HostSourceConfig, Reader, require
from ._iterable import Stream, StreamSource

ROWS = 256
"""Rows of a stream that are decoded at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HFEagerSourceConfig(HostSourceConfig):
    """`path` is a folder of `Dataset.save_to_disk`, or a name that `datasets.load_dataset` takes.

    `split` chooses among splits, `fields` among columns; those of strings must be left out.
    """

    path: str | os.PathLike[str] | None = None
    split: str | None = None
    fields: tuple[str, ...] | None = None


class HFEagerSource(HostSource):
    """A `datasets.Dataset`, given or loaded, in random access; its Arrow files stay on disk."""

    def __init__(
        self, config: HFEagerSourceConfig, dataset: Any = None, *, rngs: nnx.Rngs | None = None
    ):
        dataset = load(config, dataset, streaming=False)
        super().__init__(HFReader(dataset), config, rngs=rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HFStreamingSourceConfig:
    """As `HFEagerSourceConfig`; what is loaded by name is streamed from where it is."""

    path: str | os.PathLike[str] | None = None
    split: str | None = None
    fields: tuple[str, ...] | None = None


class HFStreamingSource(StreamSource):
    """A `datasets.IterableDataset`, given or loaded, a pass an epoch.

    Where it shuffles, `set_epoch` gives every pass another order.
    """

    def __init__(self, config: HFStreamingSourceConfig, dataset: Any = None):
        dataset = load(config, dataset, streaming=True)
        if hasattr(dataset, "to_iterable_dataset"):
            dataset = dataset.to_iterable_dataset()
        super().__init__(HFStream(dataset))


class HFStream(Stream):
    """Passes over an `IterableDataset`, which can skip by itself."""

    label = "HFStreamingSource"

    def __init__(self, dataset: Any):
        super().__init__()
        self.dataset = dataset

    def begin(self, epoch: int, skip: int) -> Iterator[dict[str, Any]]:
        self.dataset.set_epoch(epoch)
        chunks = self.dataset.with_format("arrow").skip(skip).iter(batch_size=ROWS)
        for chunk in chunks:
            fields, nulls = columns_of(chunk)
            for name in nulls:
                raise ValueError(f"column {name!r} is null")
            for i in range(chunk.num_rows):
                yield {name: np.array(x[i]) for name, x in fields.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class HFReader(Reader):
    """Rows of a data set; the handle is the data set itself, of which a copy is another one."""

    label = "HFEagerSource"

    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    @functools.cached_property
    def _arrow(self) -> Any:
        # Not "numpy": that format makes float32 of float64.
        return self.dataset.with_format("arrow")

    # A cached property where the base has a property: it, too, is only ever read.
    @functools.cached_property
    def stored_spec(self) -> Spec:  # pyright: ignore[reportIncompatibleMethodOverride]
        fields, _ = columns_of(self._arrow[:1])
        return {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in fields.items()}

    def read(self, records: np.ndarray) -> Batch:
        fields, nulls = columns_of(self._arrow[records.astype(np.int64)])
        for name in nulls:
            raise ValueError(f"column {name!r} is null")
        # Copies: a view into a mapped file must not outlive this call.
        return {name: np.array(x) for name, x in fields.items()}

    def place(self, record: int) -> str:
        files = [x["filename"] for x in self.dataset.cache_files]
        return ", ".join(files) or "a data set in memory"


def load(config: Any, dataset: Any, streaming: bool) -> Any:
    """The data set that was given, or the one that `config` names."""
    datasets = require("datasets", "hf")
    if (dataset is None) == (config.path is None):
        raise ValueError("Give either a data set or `path` in the config, and not both.")
    if dataset is None:
        path = os.fspath(config.path)
        if os.path.isdir(path):
            dataset = datasets.load_from_disk(path)
        else:
            dataset = datasets.load_dataset(path, split=config.split, streaming=streaming)
    if isinstance(dataset, dict):
        if config.split not in dataset:
            raise ValueError(f"`split` must be one of {list(dataset)}, got {config.split!r}.")
        dataset = dataset[config.split]
    return dataset if config.fields is None else dataset.select_columns(list(config.fields))
