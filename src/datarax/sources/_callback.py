"""Reads for a compiled program: a host callback that fetches rows from a `Reader`."""

import collections
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._settings import NO_TRACE, trace
from .._types import Batch, Mask, Records
from ..errors import ReadError
from ._reader import Reader

RAISED: collections.deque[ReadError] = collections.deque(maxlen=8)
"""The last errors that callbacks raised: XLA passes only their text on to the caller."""


def raised_in(error: Exception) -> ReadError | None:
    """The `ReadError` whose text is in the error of a program, if there is one."""
    return next((x for x in reversed(RAISED) if str(x) in str(error)), None)


def call_host(reader: Reader, records: Records, wanted: Mask | None = None) -> Batch:
    """The rows `records`, read when the program reaches this point; zeros where not `wanted`.

    It is a pure callback, so the compiler drops the read of an unused batch. Outside a trace it
    reads at once: JAX would keep a reference to the reader, and reduce an error to its text.
    """
    return _call(_ReadCallback(reader), records, wanted)


def call_host_readable(reader: Reader, records: Records) -> tuple[Batch, Mask]:
    """`call_host` with zeros for unreadable rows, and a mask of the readable ones."""
    return _call(_ReadCallback(reader, masks=True), records)


@dataclasses.dataclass(frozen=True)
class _ReadCallback:
    """The callback. It is equal for equal readers, so that they share compiled programs."""

    reader: Reader
    masks: bool = False

    @property
    def spec(self) -> Any:
        """Shape and type of the result for one record."""
        spec = self.reader.element_spec
        return (spec, jax.ShapeDtypeStruct((), np.dtype(bool))) if self.masks else spec

    def __call__(self, records: Any, wanted: Any) -> Any:
        try:
            return self.read(records, wanted)
        except ReadError as error:
            RAISED.append(error)
            raise

    def read(self, records: Any, wanted: Any) -> Any:
        records, spec = np.asarray(records), self.reader.element_spec
        if self.masks:
            return self.reader.rows_and_holes(records, spec)[:2]
        if wanted is None:
            return self.reader.rows(records, spec)
        wanted = np.asarray(wanted)
        batch = jax.tree.map(lambda x: np.zeros((len(records), *x.shape), x.dtype), spec)
        if wanted.any():
            rows = self.reader.rows(records[wanted], spec)
            jax.tree.map(lambda to, x: to.__setitem__(wanted, x), batch, rows)
        return batch


def _call(callback: _ReadCallback, records: Records, wanted: Mask | None = None) -> Any:
    if trace() == NO_TRACE:
        return jax.tree.map(jnp.asarray, callback.read(records, wanted))
    b = records.shape[0]
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct((b, *x.shape), x.dtype), callback.spec)
    return jax.pure_callback(callback, spec, records, wanted, vmap_method="sequential")
