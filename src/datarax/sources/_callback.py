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
