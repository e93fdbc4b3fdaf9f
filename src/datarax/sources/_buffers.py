"""Memory for rows that are read on the host, used again and again."""

import collections
import functools
import math
from typing import Any

import numpy as np

from .._host_memory import aligned

SPARE_BYTES = 96 * 2**20
"""The most that buffers of one size weigh which are kept to be used again: what is read ahead, and
what the consumer is at.
"""

SPARE_FROM = 2**17
"""Bytes from which a buffer is kept: what is smaller the allocator keeps itself."""

SIZES = 8
"""How many sizes of buffers are kept."""


def empty_rows(rows: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised array that JAX can take over on a CPU without a copy.

    Its memory has been written before where it can be: a page that is fresh from the system costs
    more than to fill it.
    """
    dtype = np.dtype(dtype)
    size = rows * math.prod(shape) * dtype.itemsize
    spare = _spare(size)
    try:
        buffer = spare.pop()
    except IndexError:
        buffer = aligned(size)
    if spare.maxlen:
        buffer = np.asarray(_Loan(buffer, spare))
    return buffer.view(dtype).reshape(rows, *shape)


class _Loan:
    """Memory lent to arrays, those of JAX included: spare again when the last of them is gone."""

    def __init__(self, buffer: np.ndarray, spare: collections.deque[np.ndarray]):
        self.__array_interface__ = buffer.__array_interface__
        self._buffer, self._spare = buffer, spare

    def __del__(self):
        self._spare.append(self._buffer)  # where that is too many, the oldest is freed


@functools.lru_cache(SIZES)
def _spare(size: int) -> collections.deque[np.ndarray]:
    """The buffers for that many bytes that nobody uses; none of sizes that are cheap or rare."""
    return collections.deque(maxlen=SPARE_BYTES // size if size >= SPARE_FROM else 0)
