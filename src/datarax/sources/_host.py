"""Sources whose records are read on the host when they are needed."""

import abc
import collections
import dataclasses
import errno
import functools
import importlib
import logging
import os
import threading
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .._order import ORDERS, Blocks, Shuffle
from .._types import Batch, Mask, Records, Spec, expect, integer
from .._xla import NO_TRACE, trace
from ..errors import DataraxError, EmptySourceError, FileError, ReadError
from ._base import EagerSourceBase
from ._records import Unfit, conform, held_spec, reason_of

T = TypeVar("T")

LOG = logging.getLogger("datarax")

OnError: TypeAlias = Literal["raise", "mask"]

ENDING = threading.Event()
"""Set when the program ends. What reads record by record then stops between two: a thread that is
in foreign code when the interpreter goes may take the process down with it."""


class EndingError(RuntimeError):
    """Nobody wants the rows that are being read."""

    def __init__(self):
        super().__init__("The program is ending, and no rows are read any more.")


def while_running(records: Iterable[T]) -> Iterator[T]:
    """Each of the records, until the program ends."""
    for record in records:
        if ENDING.is_set():
            raise EndingError()
        yield record


def require(module: str, extra: str) -> types.ModuleType:
    """An optional package, or an `ImportError` that says which extra brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise ImportError(
            f"{module!r} is needed and not installed: pip install 'datarax-reference[{extra}]'"
        ) from error


def names(option: str, given: Sequence[str] | None) -> tuple[str, ...] | None:
    """The names that an option lists; a single one would be read letter by letter."""
    if given is None:
        return None
    if isinstance(given, str) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"`{option}` is a list of names, got {given!r}.")
    if len(set(given)) < len(given) or not given:
        # One of two with one name would be lost, and a batch of none has no rows.
        raise ValueError(f"`{option}` names at least one, and none of them twice, got {given!r}.")
    return tuple(given)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostSourceConfig:
    """The options that all sources on the host share.

    Args:
        shuffle: False for stored order, True for a random order of every epoch in O(1) memory,
            "permutation" for that of `jax.random.permutation`, in O(n) memory, "blocks" for one
            that reads neighbouring records together.
        block_size: for "blocks", the records of a block; blocks come in random order.
        window: for "blocks", the number of consecutive blocks whose records are shuffled together.
        on_error: "raise" a `ReadError` for a record that cannot be read, or "mask" it: zeros, and
            False in the mask.
        max_errors: how many records of an epoch may be masked, at least 1 with "mask". A pipeline
            counts those met in its own loops and scans, from 0 again after a resume; inside a `jit`
            of yours none are counted.
    """

    shuffle: Shuffle = False
    block_size: int = 1024
    window: int = 16
    on_error: OnError = "raise"
    max_errors: int = 0

    def __post_init__(self):
        # A source keeps it, and pipelines share programs if what their parts keep can be hashed.
        for field in dataclasses.fields(self):
            if isinstance(value := getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(value))
        if not isinstance(self.shuffle, bool | str) or self.shuffle not in ORDERS:
            raise ValueError(
                f'`shuffle` is False, True, "permutation" or "blocks", got {self.shuffle!r}.'
            )
        if self.on_error not in ("raise", "mask"):
            raise ValueError(f'`on_error` is "raise" or "mask", got {self.on_error!r}.')
        most = integer(self.max_errors, -1)
        if most < 0 or (most > 0) != (self.on_error == "mask"):
            raise ValueError(
                '`max_errors` is the number of records an epoch may mask under on_error="mask", at '
                f"least 1 there and 0 otherwise; got {self.max_errors!r} with {self.on_error!r}."
            )
        Blocks(self.block_size, self.window)

    @property
    def sized_shuffle(self) -> Shuffle | Blocks:
        """`shuffle`, with its sizes where it has some."""
        return Blocks(self.block_size, self.window) if self.shuffle == "blocks" else self.shuffle


class Reader(abc.ABC):
    """Reads rows from storage: write `__len__`, `stored_spec` and `read`, and use a `HostSource`.

    A reader is small and hashable, since it is a static part of compiled programs: a frozen
    dataclass of paths and numbers. Equal readers must read the same rows, since programs that are
    compiled for one serve the other: where a file may be replaced by another under its name, hold
    its time of change too. Open files when they are first needed, in a `functools.cached_property`,
    which copies and pickles leave out. `read` is called by several threads at once. `label` is what
    errors call the source.
    """

    label: str = "a source of your own"

    only_copies: bool = False
    """Whether `read` does no more than copy memory: whoever waits for rows may then do it as well.
    Anything else is read by threads of the pipeline alone."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @property
    @abc.abstractmethod
    def stored_spec(self) -> Spec:
        """Shape and type of one record as stored, 64-bit types included."""

    @abc.abstractmethod
    def read(self, records: np.ndarray) -> Batch:
        """The rows `records`, of shape `(b,)` and in range, in that order.

        Returns a dict of NumPy arrays with the shapes and types of `stored_spec` and `b` rows.
        JAX may use their memory as it is, so never write to them afterwards. Any `Exception`
        becomes a `ReadError` that names the record.
        """

    @property
    def lasting(self) -> bool:
        """Whether another may equal it once it is gone, and use what was compiled for it."""
        return type(self).__eq__ is not object.__eq__

    def place(self, record: int) -> str:
        """Where a record is stored, for an error message."""
        del record
        return type(self).__name__

    def rows(self, records: np.ndarray, spec: Spec) -> Batch:
        """`read`, checked, in the types of `spec`; a `ReadError` names the record.

        `spec` is `element_spec` as the caller sees it: which types JAX holds is a setting of the
        caller's thread.
        """
        try:
            return self.checked(records, spec)
        except Exception as error:
            raise self._read_error(records, spec, error) from error

    def rows_and_holes(
        self, records: np.ndarray, spec: Spec
    ) -> tuple[Batch, np.ndarray, list[ReadError]]:
        """`rows`, with zero for those that cannot be read, which of them could, and the errors."""
        readable = np.ones(len(records), bool)
        try:
            return self.checked(records, spec), readable, []
        except Exception:
            batch = jax.tree.map(lambda x: np.zeros((len(records), *x.shape), x.dtype), spec)
        errors = []
        for i in range(len(records)):
            try:
                row = self.checked(records[i : i + 1], spec)
            except Exception as error:
                readable[i] = False
                errors.append(self._read_error(records[i : i + 1], spec, error))
                errors[-1].__cause__ = error
            else:
                jax.tree.map(lambda to, one, i=i: to.__setitem__(i, one[0]), batch, row)
        return batch, readable, errors

    @property
    def element_spec(self) -> Spec:
        """Shape and type of one record in the types that JAX holds them in."""
        return held_spec(lambda: self.stored_spec)

    def checked(self, records: np.ndarray, spec: Spec) -> Batch:
        """`read`, in the types of `spec`, or any error."""
        batch = self.read(np.array(records))  # which it may write to
        return conform(batch, self.stored_spec, spec, records)

    def _read_error(self, records: np.ndarray, spec: Spec, error: Exception) -> ReadError:
        """The error with the first record that cannot be read on its own."""
        for record in map(int, records) if len(records) > 1 else ():
            try:
                self.checked(np.array([record], records.dtype), spec)
            except Exception as single:
                return self._error_of(record, record, single)
        first = int(records[0])
        record = first if len(records) == 1 else None
        return self._error_of(first, record, error)

    def _error_of(self, at: int, record: int | None, error: Exception) -> ReadError:
        place, reason = self.place(at), reason_of(error)
        if isinstance(error, Unfit):  # it will be the same when it is read again
            return ReadError(self.label, place, record, reason, way_out=error.way_out, retry=False)
        return ReadError(self.label, place, record, reason)

    def __deepcopy__(self, memo: Any) -> "Reader":
        return self

    def __getstate__(self) -> dict[str, Any]:
        # What `cached_property` keeps are open files and what was read from them.
        return {
            name: x
            for name, x in vars(self).items()
            if not isinstance(getattr(type(self), name, None), functools.cached_property)
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class HostSource(EagerSourceBase):
    """A source over a `Reader`.

    In `for`, `scan` and `step` threads of the pipeline read ahead; inside `jit` of your own the
    rows come by a callback.

    Args:
        reader: what reads the rows.
        config: the order, and what to do with unreadable records.
        rngs: a seed of its own for the shuffle; without it the pipeline's is used.
    """

    def __init__(self, reader: Reader, config: HostSourceConfig, *, rngs: nnx.Rngs | None = None):
        expect("reader", reader, Reader)
        expect("config", config, HostSourceConfig)
        try:
            hash(reader)
        except TypeError as error:
            raise TypeError(
                "A reader must be hashable, since it is a static part of compiled programs, but "
                f"{type(reader).__name__} is not ({error}). Make it a frozen dataclass of paths "
                "and numbers."
            ) from error
        for name in ("rows", "rows_and_holes", "checked", "place"):
            if not callable(getattr(reader, name)):
                raise TypeError(
                    f"`{name}` is a method of every Reader, and {type(reader).__name__} has a "
                    "field of that name: call it something else."
                )
        super().__init__(shuffle=config.sized_shuffle, rngs=rngs)
        self.reader = reader
        self.config = config
        self.masks, self.max_errors = config.on_error == "mask", config.max_errors
        if len(reader) == 0:
            raise EmptySourceError(reader.label)
        try:
            reader.element_spec  # noqa: B018  (a field that JAX cannot hold is named here)
        except DataraxError:
            raise
        except Exception as error:
            raise ReadError(reader.label, reader.place(0), 0, reason_of(error)) from error

    def __len__(self) -> int:
        return len(self.reader)

    @property
    def element_spec(self) -> Spec:
        return self.reader.element_spec

    def gather(self, records: Records) -> Batch:
        return call_host(self.reader, records)

    def gather_readable(self, records: Records) -> tuple[Batch, Mask]:
        return call_host_readable(self.reader, records)


RAISED: collections.deque[ReadError] = collections.deque(maxlen=8)
"""What callbacks have raised of late: to whoever runs the program XLA gives no more than a text."""


def raised_in(error: Exception) -> ReadError | None:
    """The error of a reader that is behind the error of a program."""
    return next((x for x in reversed(RAISED) if str(x) in str(error)), None)


def call_host(reader: Reader, records: Records, wanted: Mask | None = None) -> Batch:
    """The rows `records`, read when the compiled program gets there; zero where not `wanted`.

    A pure callback: reading has no effect, so a batch that nobody uses is never read. Outside of
    any trace they are read at once: of a callback JAX keeps what it has called, and its errors are
    no more than a text.
    """
    if trace() == NO_TRACE:
        return jax.tree.map(jnp.asarray, _ReadCallback(reader).read(records, wanted))
    b = records.shape[0]
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct((b, *x.shape), x.dtype), reader.element_spec)
    args = (records,) if wanted is None else (records, wanted)
    return jax.pure_callback(_ReadCallback(reader), spec, *args, vmap_method="sequential")


def call_host_readable(reader: Reader, records: Records) -> tuple[Batch, Mask]:
    """`call_host` with zero for what cannot be read, and which of the rows can."""

    def rows(records: Any) -> tuple[Batch, np.ndarray]:
        return reader.rows_and_holes(np.asarray(records), reader.element_spec)[:2]

    if trace() == NO_TRACE:
        return jax.tree.map(jnp.asarray, rows(records))
    b = records.shape[0]
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct((b, *x.shape), x.dtype), reader.element_spec)
    mask = jax.ShapeDtypeStruct((b,), np.dtype(bool))
    return jax.pure_callback(rows, (spec, mask), records, vmap_method="sequential")


@dataclasses.dataclass(frozen=True)
class _ReadCallback:
    """`reader.rows` for a callback: equal for equal readers."""

    reader: Reader

    def __call__(self, records: Any, wanted: Any = None) -> Batch:
        try:
            return self.read(records, wanted)
        except ReadError as error:
            RAISED.append(error)
            raise

    def read(self, records: Any, wanted: Any) -> Batch:
        records = np.asarray(records)
        if wanted is None:
            return self.reader.rows(records, self.reader.element_spec)
        wanted = np.asarray(wanted)
        batch = jax.tree.map(
            lambda x: np.zeros((len(records), *x.shape), x.dtype), self.reader.element_spec
        )
        if wanted.any():
            rows = self.reader.rows(records[wanted], self.reader.element_spec)
            jax.tree.map(lambda to, x: to.__setitem__(wanted, x), batch, rows)
        return batch


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
