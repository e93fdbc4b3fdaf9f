"""Rows from storage: what reads them, and how their errors are told."""

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

    # Readers may have a cached property here, though pyright objects: it, too, is only ever read.
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
        """Shape and type of one record in the types that JAX holds them in."""
        return held_spec(lambda: self.stored_spec)

    def checked(self, records: np.ndarray, spec: Spec) -> Batch:
        """`read`, in the types of `spec`, or any error."""
        batch = self.read(np.array(records))  # which it may write to
        return conform(batch, self.stored_spec, spec, records)

    def _read_error(self, records: np.ndarray, spec: Spec, error: Exception) -> ReadError:
        """The error with the first record that cannot be read on its own."""
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
        # What `cached_property` keeps are open files and what was read from them.
        return {
            name: x
            for name, x in vars(self).items()
            if not isinstance(getattr(type(self), name, None), functools.cached_property)
        }
