"""What XLA has to be told, on one kind of device or another, to compile what was meant."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ._settings import NO_TRACE, on_cpu, trace, transferring
from ._types import Scalar, namespace

T = TypeVar("T")

ONE_THREAD = {"xla_disable_hlo_passes": "cpu-parallel-task-assigner"}
"""Options for `jax.jit` under which no kernel is shared out among the threads of a CPU.

XLA means to share out what reads or writes more than 256 KiB a thread, but takes a gather for one
that reads its whole operand; to wake a thread takes longer than to gather a small batch. JAX
accepts options outside any trace only.
"""


def beside(number: int) -> contextlib.AbstractContextManager[Any]:
    """What is called meanwhile does not wait, on a CPU, for what was called under other numbers.

    XLA's CPU client else begins with a program when the last one that the thread has called is
    done, so that two that have nothing to do with each other use one processor.
    """
    return contextlib.nullcontext() if _STREAM is None else _STREAM(number)


try:  # no public part of JAX
    from jaxlib.xla_client import execution_stream_id as _STREAM
except ImportError:
    _STREAM = None

SIDE_BY_SIDE = _STREAM is not None
"""Whether `beside` can do what it says."""


def weak_zeros(shape: tuple[int, ...], dtype: Any) -> jax.Array | None:
    """Zeros that adopt the type of what they meet, as Python's do; None where JAX has none."""
    zero = jnp.asarray(np.zeros((), dtype).item())
    return jnp.broadcast_to(zero, shape) if zero.dtype == dtype else None


def _blank(like: jax.ShapeDtypeStruct) -> jax.Array:
    """Zeros of that type: if only one branch has a weak type, the result has none."""
    weak = weak_zeros(like.shape, like.dtype) if like.weak_type else None
    return jax.lax.full_like(like, 0) if weak is None else weak


def apart(number: Scalar, function: Callable[..., T], *args: Any) -> T:
    """`function(*args)`, of a program for the CPU a part that is compiled by itself.

    `number` is any of its type but the largest. XLA's compiler for the CPU fuses what is computed
    once a row into the loop over its elements, and computes it again for each of them: an index, a
    random number. It moves nothing into a branch that it cannot prove to be taken. And where more
    than a few kernels stand side by side, they are shared out among threads, which takes longer
    than small ones themselves; a branch counts as one.
    """
    if not on_cpu() or trace() == NO_TRACE:  # outside of a program it is run as it is written
        return function(*args)
    once = jax.jit(function)  # traced once for the two calls
    blank = jax.tree.map(_blank, jax.eval_shape(once, *args))
    kind = number.dtype
    always = number < kind.type(np.iinfo(kind).max)
    return jax.lax.cond(always, once, lambda *_: blank, *args)


def as_one_program(function: Callable[..., T], *args: Any, **static: Any) -> T:
    """`function(*args, **static)`, compiled if no trace is open, and if not all is NumPy's.

    For what is called outside of any program, too, and there would take a hundred times as long
    one operation at a time. `static` is hashed and kept for as long as the program is.
    """
    if trace() != NO_TRACE or namespace(*jax.tree.leaves(args)) is np:
        return function(*args, **static)
    with transferring():
        return _program_of(function, tuple(static))(*args, **static)


@functools.lru_cache
def _program_of(function: Callable[..., T], static: tuple[str, ...]) -> Callable[..., T]:
    return jax.jit(function, static_argnames=static)
