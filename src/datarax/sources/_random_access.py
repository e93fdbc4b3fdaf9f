"""Any object with `__len__` and `__getitem__` as a source."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from flax import nnx

from .._types import Batch, Spec, expect, names
from ._conform import Unfit, first_readable, spec_of, stack
from ._host import HostSource, HostSourceConfig
from ._reader import Reader, while_running
from ._values import BY_NAME, as_record, is_table


@runtime_checkable
class Indexable(Protocol):
    """An object with random access: a torch `Dataset`, a Grain data source, a list."""

    def __len__(self) -> int: ...
    def __getitem__(self, record: Any) -> Any: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomAccessSourceConfig(HostSourceConfig):
    """How a `RandomAccessSource` names fields; `HostSourceConfig` has the other options.

    Args:
        fields: names for the items of records that are tuples; None calls them "0", "1", ... For
            records that are dicts, the fields to read.
    """

    fields: Sequence[str] | None = None


class RandomAccessSource(HostSource):
    """The records of any object with `__len__` and `__getitem__`: a list, a torch `Dataset`, ...

    Args:
        config: the order, and names for fields.
        data: the object. `data[i]` must return the same record every time, also when several
            threads call it at once. A record is a dict (nested dicts allowed), a tuple, or one
            array, which becomes the field "data"; lists in it become arrays. If `data` has the
            `__getitems__` of torch and Grain, one call of it reads a batch.
        rngs: the seed of the shuffle. Without it the source uses the pipeline's seed.
    """

    def __init__(
        self,
        config: RandomAccessSourceConfig,
        data: Indexable,
        *,
        rngs: nnx.Rngs | None = None,
    ):
        expect("config", config, RandomAccessSourceConfig)
        if not isinstance(data, Indexable):
            raise TypeError(
                "RandomAccessSource takes an object with `__len__` and `__getitem__`, got "
                f"{type(data).__name__}. What can only be iterated is for IterableSource."
            )
        if isinstance(data, Mapping) and 0 not in data:
            raise TypeError(
                "RandomAccessSource reads record i as data[i], and got a dict. A dict of columns "
                "is for MemorySource."
            )
        # `iloc` shows a pandas object, whose `[i]` looks up the label `i`.
        if is_table(data) or hasattr(data, "iloc"):
            raise TypeError(
                "RandomAccessSource reads record i as data[i], but data[i] of a "
                f"{type(data).__name__} is not a record. Its columns are for MemorySource. "
                f"{BY_NAME}"
            )
        super().__init__(ObjectReader(data, names("fields", config.fields)), config, rngs=rngs)


@dataclasses.dataclass(frozen=True, eq=False)
class ObjectReader(Reader):
    """Reads by indexing. Compared by identity: two objects may be equal and hold other records."""

    label = "RandomAccessSource"

    data: Any
    fields: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return self._length

    @functools.cached_property
    def _length(self) -> int:  # cached: a list may grow, but the length of an epoch is fixed
        return len(self.data)

    @functools.cached_property
    def stored_spec(self) -> Spec:  # pyright: ignore[reportIncompatibleMethodOverride]
        return first_readable(
            lambda i: spec_of(as_record(self.data[i], self.fields)), len(self.data)
        )

    def read(self, records: np.ndarray) -> Batch:
        wanted = records.tolist()
        if hasattr(self.data, "__getitems__"):
            found = self.data.__getitems__(wanted)
            found = found if isinstance(found, Mapping) else list(found)
            if isinstance(found, Mapping) or len(found) != len(wanted):
                what = "a dict" if isinstance(found, Mapping) else f"{len(found)}"
                raise Unfit(
                    "`__getitems__` must return a list of as many records as it is asked for, "
                    f"here {len(wanted)}, and has returned {what}"
                )
        else:
            found = [self.data[i] for i in while_running(wanted)]
        return stack([as_record(x, self.fields) for x in found])

    def place(self, record: int) -> str:
        return type(self.data).__name__
