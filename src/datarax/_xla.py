"""What XLA has to be told, on one kind of device or another, to compile what was meant."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import get_opaque_trace_state

from ._types import Scalar

T = TypeVar("T")

ONE_THREAD = {"xla_disable_hlo_passes": "cpu-parallel-task-assigner"}
"""Options for `jax.jit` under which no kernel is shared out among the threads of a CPU.

XLA means to share out what reads or writes more than 256 KiB a thread, but takes a gather for one
that reads its whole operand; to wake a thread takes longer than to gather a small batch. JAX
accepts options outside any trace only.
"""


ALIGNMENT = 64
"""Bytes: XLA's CPU client shares memory that starts at a multiple of this, and copies any other."""


def aligned(count: int) -> np.ndarray:
    """So many uninitialised bytes that JAX can take over on a CPU without a copy."""
    memory = np.empty(count + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + count]


_SETTINGS = attrgetter(
    "jax_enable_x64",
    "jax_disable_jit",
    "jax_default_device",
    "jax_default_matmul_precision",
    "jax_numpy_dtype_promotion",
    "jax_threefry_partitionable",
    "jax_debug_nans",
    "jax_debug_infs",
)

try:  # no public part of JAX: a third of the time, and all settings that it compiles anew for
    from jax._src.config import debug_infs, debug_nans, trace_context
    from jax._src.core import trace_state
except ImportError:

    def context() -> Any:
        """As below, as far as the public parts of JAX tell."""
        return get_opaque_trace_state(convention="nnx"), *_SETTINGS(jax.config)

else:

    def context() -> Any:
        """The trace of JAX's that is open now, if any, and the settings that can change what a
        program returns, or whether it does; a thread may have its own. Nothing but comparing it
        means anything.
        """
        return trace_state.value, trace_context(), debug_nans.value, debug_infs.value


def trace() -> Any:
    """The first part of `context`."""
    return context()[0]


def settings() -> Any:
    """The other parts of `context`."""
    return context()[1:]


NO_TRACE = trace()
"""What `trace` gives where none is open."""


def checks_values() -> bool:
    """Whether JAX has been told to raise where a program returns a NaN, or an infinite number."""
    return any(_CHECKS(jax.config))


def checking_values() -> contextlib.AbstractContextManager[Any]:
    """Lets JAX look for NaNs in what is called meanwhile, if it has been told to.

    When it runs a traced program as a function, as `cond` and others make it do, it stops looking,
    and begins again for none but the first call of any program in that thread.
    """
    if not checks_values():
        return _UNGUARDED
    return _checking(*_CHECKS(jax.config))


@contextlib.contextmanager
def _checking(nans: bool, infs: bool) -> Iterator[None]:
    with jax.debug_nans(nans), jax.debug_infs(infs):
        yield


_CHECKS = attrgetter("jax_debug_nans", "jax_debug_infs")


def on_cpu() -> bool:
    """Whether what is traced now is to run on the CPU."""
    chosen = _chosen_device()
    return (getattr(chosen, "platform", chosen) or jax.default_backend()) == "cpu"


def _chosen_device() -> Any:
    """What `jax.default_device` was given, if anything: a device, or the name of a platform."""
    # JAX makes the attribute as it runs.
    return jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]


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


@functools.cache
def keep_memory() -> None:
    """Lets the process keep up to 64 MiB of what it frees for what it allocates next.

    As soon as glibc has given a piece of memory back, it takes pieces of that size from the heap
    and leaves twice as much free at the heap's end. Until then whoever frees a few batches together
    gets the memory of the next ones page by page, which can take longer than to compute them. So it
    is shown at once a piece as large as it learns from.

    It is asked for where programs on a CPU make the batches. Rows that are read from files lie in
    memory of their own, which is kept anyway, and which is faster outside the heap.
    """
    if on_cpu():
        np.empty(LARGEST_PIECE, np.uint8)  # given back at once, and no page of it was touched


LARGEST_PIECE = 2**25 - 2**16
"""Bytes, just under the 32 MiB from which on glibc learns nothing."""


def to_device(tree: Any) -> Any:
    """Arrays of types that JAX holds on the default device, as `jax.device_put` places them.

    On a CPU that takes as long as to copy a hundred kilobytes, and no other thread can run Python
    meanwhile. So there, unless a device was chosen, it is only what `device_put` ends with.
    """
    plain = _chosen_device() is None and on_cpu()
    put = _put_on_cpu(jax.local_devices()[0]) if plain else None
    if put is None:
        return jax.device_put(tree)
    with transferring():
        return jax.tree.map(lambda x: put(x) if isinstance(x, np.ndarray) else x, tree)


_GUARDS = attrgetter(
    "jax_transfer_guard",
    "jax_transfer_guard_host_to_device",
    "jax_transfer_guard_device_to_device",
    "jax_transfer_guard_device_to_host",
)


def transferring() -> contextlib.AbstractContextManager[Any]:
    """Marks what is transferred meanwhile as meant, for whoever has set `jax.transfer_guard`."""
    return (
        _UNGUARDED
        if _GUARDS(jax.config) == (None, None, None, None)
        else jax.transfer_guard("allow")
    )


_UNGUARDED = contextlib.nullcontext()


@functools.lru_cache(1)  # by device, since a backend that is cleared has others afterwards
def _put_on_cpu(device: Any) -> Callable[[np.ndarray], jax.Array] | None:
    """No public part of JAX: None where it is not what it was."""
    x = np.ones(2, np.float32)
    wanted = jax.device_put(x)
    where, devices = wanted.sharding, [device]

    @functools.lru_cache
    def shaped(shape: tuple[int, ...], dtype: np.dtype) -> ShapedArray:
        return ShapedArray(shape, dtype)

    try:
        from jaxlib.xla_client import batched_device_put

        def put(x: np.ndarray) -> jax.Array:
            return batched_device_put(shaped(x.shape, x.dtype), where, [x], devices, False)

        found = put(x)
    except Exception:
        return None
    return put if (found.aval, found.committed) == (wanted.aval, False) else None


def weak_zeros(shape: tuple[int, ...], dtype: Any) -> jax.Array | None:
    """Zeros that adopt the type of what they meet, as Python's do; None where JAX has none."""
    zero = jnp.asarray(np.zeros((), dtype).item())
    return jnp.broadcast_to(zero, shape) if zero.dtype == dtype else None


def _blank(like: jax.ShapeDtypeStruct) -> jax.Array:
    """Zeros of that type: if only one branch has a weak type, the result has none."""
    weak = weak_zeros(like.shape, like.dtype) if like.weak_type else None
    return jax.lax.full_like(like, 0) if weak is None else weak


def apart(number: Scalar, function: Callable[..., T], *args: Any) -> T:
    """`function(*args)`, compiled by itself on the CPU; `number` is any that is not the largest.

    That compiler fuses what is computed once a row into the loop over its elements, and computes
    it again for each of them: an index, a random number. It moves nothing into a branch that it
    cannot prove to be taken. And where more than a few kernels stand side by side, they are shared
    out among threads, which takes longer than small ones themselves; a branch counts as one.
    """
    if not on_cpu():
        return function(*args)
    once = jax.jit(function)  # traced once for the two calls
    blank = jax.tree.map(_blank, jax.eval_shape(once, *args))
    kind = number.dtype
    always = number < kind.type(np.iinfo(kind).max)
    return jax.lax.cond(always, once, lambda *_: blank, *args)
