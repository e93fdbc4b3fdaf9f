"""Streams: sources without a length, which are read from front to back."""

import abc
import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .._keys import BaseKey, base_words
from .._modules import Watched
from .._order import window_order
from .._rows import Cut, Rows
from .._types import Batch, Signed, Spec, expect, integer, names
from ..errors import DataraxError, EmptySourceError, RandomAccessError, ReadError
from ._base import SourceBatch
from ._conform import conform, copier, held_spec, read_error, spec_of, stack
from ._reader import while_running
from ._values import BY_NAME, as_record, is_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamSourceConfig:
    """The options that all streams share.

    Args:
        shuffle: shuffles the records within each window, in a new order every epoch (spec
            SRC-039).
        window: the number of consecutive records in a window. The source reads a whole window into
            memory before it gives the first record, so one unreadable record fails the window.
            After a resume, the source reads the window of the cursor again.
    """

    shuffle: bool = False
    window: int = 1024

    def __post_init__(self):
        if not isinstance(self.shuffle, bool):
            raise ValueError(
                f"`shuffle` of a stream is False or True, which is within windows, got "
                f"{self.shuffle!r}."
            )
        if not 1 <= integer(self.window, 0) < 2**31:
            raise ValueError(f"`window` is an integer in [1, 2**31), got {self.window!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class IterableSourceConfig(StreamSourceConfig):
    """How an `IterableSource` names fields; `StreamSourceConfig` has the other options.

    Args:
        fields: names for the items of records that are tuples; None calls them "0", "1", ... For
            records that are dicts, the fields to read.
    """

    fields: Sequence[str] | None = None


class StreamSource(Watched, metaclass=Signed):
    """A source over a `Stream`. A pipeline over it works outside of `jit` only.

    An epoch is one pass and ends where the stream does (spec SRC-027). After a resume or a `seek`,
    the stream skips records from the start of the pass to the cursor, so the cost grows with the
    offset; a shuffled one skips to the window of the cursor.

    Args:
        stream: reads the records.
        config: whether to shuffle.
        rngs: the seed of the shuffle. Without it the source uses the pipeline's seed.
    """

    shuffle: bool = False
    window: int = 1024
    base: BaseKey | None = None

    def __init__(
        self,
        stream: "Stream",
        config: StreamSourceConfig | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ):
        config = StreamSourceConfig() if config is None else config
        expect("stream", stream, Stream)
        expect("config", config, StreamSourceConfig)
        self.stream = stream
        self.shuffle, self.window = config.shuffle, config.window
        self.base = None if rngs is None else BaseKey(base_words(rngs, "shuffle"))

    @property
    def order_name(self) -> str:
        """The name of the order in a saved state."""
        kind = type(self).__qualname__
        return f"{kind}-windows-{self.window}" if self.shuffle else kind

    @property
    def element_spec(self) -> Spec:
        """Shape and type of one record."""
        return held_spec(lambda: self.stream.stored_spec)

    def blank(self, cut: Cut) -> SourceBatch:
        """A batch of zeros with the shapes and types of the stream's batches, for tracing."""
        batch = jax.tree.map(lambda x: jnp.zeros((cut.size, *x.shape), x.dtype), self.element_spec)
        where = jnp.zeros(cut.size, jnp.uint32)
        mask = jnp.zeros(cut.size, bool) if cut.padded else None
        return SourceBatch(batch, Rows(where, where, where, mask))

    def get_batch_at(self, start: Any, batch_size: int, key: Any = None) -> Batch:
        """Raises a `RandomAccessError`: a stream has no random access (spec SRC-029)."""
        raise RandomAccessError(
            f"{self.stream.label} is a stream and gives its records in order, so it cannot be read "
            "inside jit or another transformation. Take batches by `for`, `step` or `scan` outside "
            "of them, or use a source with a length."
        )


class IterableSource(StreamSource):
    """The records of an iterable, in its order.

    Args:
        config: names for fields, and whether to shuffle.
        records: an iterable that can be iterated repeatedly, or a function that returns a new
            iterator for each pass. A record is a dict, a tuple or one array, as in
            `RandomAccessSource`; all have the same fields, shapes and types. An iterable that gives
            its records only once serves one epoch of one pipeline.
        rngs: the seed of the shuffle. Without it the source uses the pipeline's seed.
    """

    def __init__(
        self,
        config: IterableSourceConfig,
        records: Iterable[Any] | Callable[[], Iterator[Any]],
        *,
        rngs: nnx.Rngs | None = None,
    ):
        expect("config", config, IterableSourceConfig)
        if isinstance(records, Mapping):
            raise TypeError(
                "IterableSource takes records one by one, and got a dict, which gives its keys. A "
                "dict of columns is for MemorySource."
            )
        if is_table(records):
            raise TypeError(
                "IterableSource takes records one by one, but to iterate over a "
                f"{type(records).__name__} does not give its records. Its columns are for "
                f"MemorySource. {BY_NAME}"
            )
        if isinstance(records, Iterator):
            raise TypeError(
                f"A {type(records).__name__} can be read once, and a stream is read again for "
                "every epoch and every resume. Give a function that returns a new iterator."
            )
        if not isinstance(records, Iterable | Callable):
            raise TypeError(
                "IterableSource takes an iterable, or a function that returns an iterator, got "
                f"{type(records).__name__}."
            )
        # An iterable that can also be called, as a data set with a method for it, is iterated.
        begin = functools.partial(iter, records) if isinstance(records, Iterable) else records
        stream = IterableStream(begin, names("fields", config.fields), "IterableSource")
        super().__init__(stream, config, rngs=rngs)


class Stream(abc.ABC):
    """Records in an order that the epoch alone decides: write `begin`, and use a `StreamSource`.

    A stream is a static attribute of compiled programs, compared by identity, and copies of a
    pipeline share it. Error messages call the source by its `label`.
    """

    label: str = "a stream of your own"

    reads_on: bool = False
    """Whether to skip records in the open pass instead of calling `begin` again.

    Set it if `begin` itself skips by reading. A pass that has given no record yet then serves any
    epoch.
    """

    _pass: "_Pass"

    def __new__(cls, *args: Any, **kwargs: Any) -> "Stream":
        # Not in `__init__`: a dataclass replaces it, and copies and pickles do not call it.
        self = super().__new__(cls)
        vars(self)["_pass"] = _Pass()  # a frozen dataclass forbids the attribute assignment
        return self

    @abc.abstractmethod
    def begin(self, epoch: int, skip: int) -> Iterator[dict[str, Any]]:
        """The records of a pass without the first `skip`, as dicts of arrays and numbers.

        Returns a new iterator at every call. Nothing but `epoch` may change the records (spec
        SRC-011, SRC-028).
        """

    @property
    def stored_spec(self) -> Spec:
        """Shape and type of the first record of a pass."""
        here = self._pass
        if (spec := here.spec) is None:
            with here.lock:
                spec = here.spec = self._look() if here.spec is None else here.spec
        return spec

    def _look(self) -> Spec:
        """Opens a pass and reads its first record. The pass stays open and still gives this record,
        since an iterable that can be read once has no second pass."""
        try:
            records = iter(self.begin(0, 0))
            for first in records:
                if not isinstance(first, dict):
                    raise TypeError(
                        "a stream gives its records as dicts of arrays and numbers, and this one "
                        f"is of type {type(first).__name__}"
                    )
                spec = spec_of(first)
                self._pass.records, self._pass.at = self._seen(first, records), (0, 0)
                return spec
        except DataraxError:
            raise
        except Exception as error:
            raise self._read_error(0, error) from error
        raise EmptySourceError(self.label)

    def _seen(self, first: Any, others: Iterator[Any]) -> Iterator[Any]:
        """The pass that `_look` opened, which another thread may read."""
        known = _bytes_of(first)
        yield first
        try:
            second = [*itertools.islice(others, 1)]
        except Exception:
            # An iterator may be bound to the thread that opened it, as SQLite's are. Begin again in
            # this thread, unless the pass then starts with another record: one would be lost.
            others, second = iter(self.begin(0, 0)), []
            if [_bytes_of(again) for again in itertools.islice(others, 1)] != [known]:
                raise
        yield from second
        yield from others

    def read(self, epoch: int, offset: int, count: int, spec: Spec) -> list[dict[str, Any]]:
        """Up to `count` records from `offset` on; fewer only where the pass ends."""
        stored, here = self.stored_spec, self._pass
        copied = copier(stored, spec)
        with here.lock:
            found: list[dict[str, Any]] = []
            try:
                for record in while_running(self._from(epoch, offset)):
                    one = copied(record)  # a copy, since the stream may reuse its memory
                    if one is None:
                        rows = stack([record])
                        conform(rows, stored, spec, np.array([offset + len(found)]))
                        one = jax.tree.map(lambda x: x[0], rows)
                    found.append(one)
                    if len(found) == count:
                        break
            except BaseException as error:
                here.records = None  # a generator that has raised gives no more records
                if not isinstance(error, Exception):
                    raise
                raise self._read_error(offset + len(found), error) from error
            here.at = epoch, offset + len(found)
            if here.at[1] == 0:
                here.records = None  # an empty pass may give records when it is begun again
            return found

    def _from(self, epoch: int, offset: int) -> Iterator[Any]:
        """The records from `offset` on: from the open pass if it can reach them, or a new one."""
        here = self._pass
        opened, at = here.at
        goes_on = here.at == (epoch, offset)
        on_the_way = self.reads_on and at <= offset and (opened == epoch or at == 0)
        if here.records is None or not (goes_on or on_the_way):
            here.records, at = iter(self.begin(epoch, offset)), offset
        here.at = epoch, offset
        for _ in while_running(itertools.islice(here.records, offset - at)):
            pass
        return here.records

    def _read_error(self, record: int, error: Exception) -> ReadError:
        way_out = "To go on without such records, leave them out of the stream."  # not "mask"
        return read_error(self.label, self.label, record, error, way_out=way_out)

    def __deepcopy__(self, memo: Any) -> "Stream":
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: x for name, x in vars(self).items() if name != "_pass"}


class _Pass:
    """The mutable state of a stream: its spec, the iterator of the open pass, and the epoch and
    offset of the next record in it."""

    def __init__(self):
        self.lock = threading.Lock()
        self.spec: Spec | None = None
        self.records: Iterator[Any] | None = None
        self.at: tuple[int, int] = (0, 0)


class Windows:
    """Reads a stream by windows and shuffles each (spec SRC-039).

    `words(epoch)` gives the two words of the epoch's key. The last window stays in memory.
    """

    def __init__(self, stream: Stream, size: int, words: Callable[[int], Any]):
        self._stream, self._size, self._words = stream, size, words
        self._known: tuple[Any, list[dict[str, Any]], list[int]] = None, [], []

    def read(
        self, epoch: int, offset: int, count: int, spec: Spec
    ) -> tuple[list[dict[str, Any]], list[int]]:
        """Up to `count` records from `offset` on, and the number of each in the pass; fewer only
        where the pass ends."""
        found: list[dict[str, Any]] = []
        numbers: list[int] = []
        while len(found) < count:
            number, inside = divmod(offset + len(found), self._size)
            records, order = self._window(epoch, number, spec)
            here = order[inside : inside + count - len(found)]
            found += [records[i] for i in here]
            numbers += [number * self._size + i for i in here]
            ends = len(records) < self._size and inside + len(here) >= len(records)
            del records
            if ends:
                break
        return found, numbers

    def _window(
        self, epoch: int, number: int, spec: Spec
    ) -> tuple[list[dict[str, Any]], list[int]]:
        if self._known[0] != (epoch, number):
            self._known = None, [], []  # free the old window before the new one is read
            records = self._stream.read(epoch, number * self._size, self._size, spec)
            keys = np.asarray(self._words(epoch))
            order = window_order(keys, number, len(records)).tolist() if records else []
            self._known = (epoch, number), records, order
        return self._known[1:]


class IterableStream(Stream):
    """Passes over an iterable. It skips records by reading them."""

    reads_on = True

    def __init__(self, new: Callable[[], Iterator[Any]], fields: Sequence[str] | None, label: str):
        self.new, self.fields, self.label = new, fields, label

    def begin(self, epoch: int, skip: int) -> Iterator[dict[str, Any]]:
        del epoch
        records = iter(self.new())
        for _ in while_running(itertools.islice(records, skip)):
            pass
        return (as_record(record, self.fields) for record in records)


def _bytes_of(record: Any) -> list[bytes]:
    return [x.tobytes() for x in jax.tree.leaves(stack([record]))]
