"""Steers how XLA compiles and runs programs, mostly on a CPU."""

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
"""Compiler options for `jax.jit` that keep every kernel on a single thread of a CPU.

XLA splits a kernel among threads if it reads or writes more than 256 KiB per thread. It assumes
that a gather reads its whole operand, so it splits even the gather of a small batch, and waking a
thread (10-70 us) takes longer than that gather. JAX accepts compiler options only outside a trace.
"""


def beside(number: int) -> contextlib.AbstractContextManager[Any]:
    """Puts the programs called in its `with` block on the execution stream `number` of XLA.

    XLA's CPU client starts a program only after the previous one on the same stream has ended. By
    default each thread is one stream, so two independent programs use one processor.
    """
    return contextlib.nullcontext() if _STREAM is None else _STREAM(number)


try:  # private to JAX
    from jaxlib.xla_client import execution_stream_id as _STREAM
except ImportError:
    _STREAM = None

SIDE_BY_SIDE = _STREAM is not None
"""Whether this JAX supports `beside`; otherwise it does nothing."""


def weak_zeros(shape: tuple[int, ...], dtype: Any) -> jax.Array | None:
    """Weakly typed zeros, like a Python scalar; None if no Python scalar has that dtype in JAX."""
    zero = jnp.asarray(np.zeros((), dtype).item())
    return jnp.broadcast_to(zero, shape) if zero.dtype == dtype else None


def _blank(like: jax.ShapeDtypeStruct) -> jax.Array:
    """Zeros, weakly typed if `like` is: a `cond` is so only if both of its branches are."""
    weak = weak_zeros(like.shape, like.dtype) if like.weak_type else None
    return jax.lax.full_like(like, 0) if weak is None else weak


def in_own_branch(number: Scalar, function: Callable[..., T], *args: Any) -> T:
    """`function(*args)`; in a program for a CPU, inside a branch that is always taken.

    Without the branch, XLA's CPU compiler fuses what is computed once per row (an index, a random
    number) into its consumers, and recomputes it for every element of the row. It fuses nothing
    into a branch that it cannot prove to be taken. It also spreads more than a few independent
    kernels over threads, which takes longer than small kernels themselves; a branch counts as one.

    The branch is taken if `number` is below the maximum of its dtype. The caller must ensure that,
    and that XLA cannot prove it: `number` must not be a constant.
    """
    if not on_cpu() or trace() == NO_TRACE:
        return function(*args)
    once = jax.jit(function)  # so that `eval_shape` and `cond` trace it once
    blank = jax.tree.map(_blank, jax.eval_shape(once, *args))
    kind = number.dtype
    always = number < kind.type(np.iinfo(kind).max)
    return jax.lax.cond(always, once, lambda *_: blank, *args)


def as_one_program(function: Callable[..., T], *args: Any, **static: Any) -> T:
    """`function(*args, **static)`, jitted unless a trace is open or all arrays are NumPy's.

    For functions that are also called outside of programs, where running one operation at a time
    would take a hundred times as long. The values in `static` must be hashable, and the cached
    program keeps them alive.
    """
    if trace() != NO_TRACE or namespace(*jax.tree.leaves(args)) is np:
        return function(*args, **static)
    with transferring():
        return _program_of(function, tuple(static))(*args, **static)


@functools.lru_cache
def _program_of(function: Callable[..., T], static: tuple[str, ...]) -> Callable[..., T]:
    return jax.jit(function, static_argnames=static)
