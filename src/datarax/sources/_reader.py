"""`Reader`: how a source reads rows from storage, and how it reports a row that it cannot read."""

import abc
import functools
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np

from .._types import Batch, Spec
from ..errors import ReadError
from ._conform import conform, held_spec, read_error

T = TypeVar("T")

ENDING = threading.Event()
"""Set when the interpreter begins to shut down; `while_running` then stops between two records.

A thread that is still inside an extension module at the end of the shutdown can crash the process.
"""


class EndingError(RuntimeError):
    """The interpreter is shutting down, so a read was abandoned."""

    def __init__(self):
        super().__init__("The program is ending, and no rows are read any more.")


def while_running(records: Iterable[T]) -> Iterator[T]:
    """Yields the records; raises an `EndingError` once the interpreter shuts down."""
    for record in records:
        if ENDING.is_set():
            raise EndingError()
        yield record


class Reader(abc.ABC):
    """Reads rows from storage: write `__len__`, `stored_spec` and `read`, and use a `HostSource`.

    A reader must be hashable, since it is a static attribute of compiled programs: make it a frozen
    dataclass of paths and numbers. Equal readers must read the same rows, since they share compiled
    programs. If another file may replace one of the same name, add its modification time to the
    fields. Open files in a `functools.cached_property`: a pickle leaves its value out. Several
    threads call `read` at once (spec SRC-019). Error messages call the source by its `label`.
    """

    label: str = "a source of your own"

    only_copies: bool = False
    """Whether `read` only copies memory. The consumer thread may then call it instead of waiting;
    otherwise only the pipeline's own threads do."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    # Subclasses use a `cached_property` here. pyright rejects it, since it could be assigned to.
    @property
    @abc.abstractmethod
    def stored_spec(self) -> Spec:
        """Shape and type of one record as stored; 64-bit types stay 64-bit."""

    @abc.abstractmethod
    def read(self, records: np.ndarray) -> Batch:
        """The rows `records`, in that order.

        `records` has the shape `(b,)` and values in `[0, len(self))`. Returns a dict of NumPy
        arrays of `b` rows with the shapes and types of `stored_spec`. Never write to these arrays
        afterwards: JAX may share their memory. An `Exception` becomes a `ReadError` that names the
        record.
        """

    def place(self, record: int) -> str:
        """The name of the file that holds a record, for error messages."""
        del record
        return type(self).__name__

    def rows(self, records: np.ndarray, spec: Spec) -> Batch:
        """`checked`, with a `ReadError` that names the first unreadable record.

        `spec` is the caller's `element_spec`: jax_enable_x64 may differ between threads, so this
        thread could compute another one.
        """
        try:
            return self.checked(records, spec)
        except Exception as error:
            raise self._read_error(records, spec, error) from error

    def rows_and_holes(
        self, records: np.ndarray, spec: Spec
    ) -> tuple[Batch, np.ndarray, list[ReadError]]:
        """`rows` with zeros for unreadable rows; a mask of the readable ones, and the errors.

        If the batch fails as a whole, it is read again row by row.
        """
        readable = np.ones(len(records), bool)
        try:
            return self.checked(records, spec), readable, []
        except Exception:
            batch = jax.tree.map(lambda x: np.zeros((len(records), *x.shape), x.dtype), spec)
        errors = []
        for i in while_running(range(len(records))):
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
        """`stored_spec` in the types that JAX holds."""
        return held_spec(lambda: self.stored_spec)

    def checked(self, records: np.ndarray, spec: Spec) -> Batch:
        """`read`, checked against `stored_spec` and cast to `spec`; raises any error."""
        batch = self.read(np.array(records))  # a copy, since `read` may write to it
        return conform(batch, self.stored_spec, spec, records)

    def _read_error(self, records: np.ndarray, spec: Spec, error: Exception) -> ReadError:
        """The `ReadError` for a batch, found by reading its records one by one.

        It names no record if each of them can be read now.
        """
        for record in while_running(map(int, records) if len(records) > 1 else ()):
            try:
                self.checked(np.array([record], records.dtype), spec)
            except Exception as single:
                return read_error(self.label, self.place(record), record, single)
        first = int(records[0])
        record = first if len(records) == 1 else None
        return read_error(self.label, self.place(first), record, error)

    def __deepcopy__(self, memo: Any) -> "Reader":
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A `cached_property` holds open files, or data read from them.
        return {
            name: x
            for name, x in vars(self).items()
            if not isinstance(getattr(type(self), name, None), functools.cached_property)
        }
