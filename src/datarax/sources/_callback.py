"""Rows that a compiled program asks for while it runs."""

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
    return _call(_ReadCallback(reader), records, wanted)


def call_host_readable(reader: Reader, records: Records) -> tuple[Batch, Mask]:
    """`call_host` with zero for what cannot be read, and which of the rows can."""
    return _call(_ReadCallback(reader, masks=True), records)


@dataclasses.dataclass(frozen=True)
class _ReadCallback:
    """`reader.rows` for a callback: equal for equal readers."""

    reader: Reader
    masks: bool = False

    @property
    def spec(self) -> Any:
        """Shape and type of what comes for one record."""
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
