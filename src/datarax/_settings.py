"""The state of JAX and of the process that other modules depend on.

That is the settings of JAX, the trace that is open, the default device and the processors. The
first three can differ between threads.
"""

import contextlib
import os
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import jax
from jax.extend.core import get_opaque_trace_state

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

# These names are private to JAX. They cover every setting for which JAX compiles again, and take a
# third of the time of the public ones.
try:
    from jax._src.config import debug_infs, debug_nans, trace_context
    from jax._src.core import trace_state
except ImportError:

    def context() -> Any:
        """As below, for the settings in `_SETTINGS` alone, from public parts of JAX."""
        return get_opaque_trace_state(convention="nnx"), *_SETTINGS(jax.config)

else:

    def context() -> Any:
        """The open trace of JAX, if any, and the settings that can change what a program returns
        or whether it raises, both for this thread. Compare it for equality; do nothing else.
        """
        return trace_state.value, trace_context(), debug_nans.value, debug_infs.value


def trace() -> Any:
    """The first part of `context`."""
    return context()[0]


def settings() -> Any:
    """The other parts of `context`."""
    return context()[1:]


NO_TRACE = trace()
"""What `trace` returns if no trace is open."""


_CHECKS = attrgetter("jax_debug_nans", "jax_debug_infs")
_NO_CHANGE = contextlib.nullcontext()


def checks_values() -> bool:
    """Whether `jax_debug_nans` or `jax_debug_infs` is set."""
    return any(_CHECKS(jax.config))


def checking_values() -> contextlib.AbstractContextManager[Any]:
    """Keeps `jax_debug_nans` and `jax_debug_infs` working in its `with` block, if they are set.

    When JAX evaluates a jaxpr as a function, as `lax.cond` does, it turns off the check for NaNs in
    that thread. Afterwards it checks only the first call of each program there, until the flags are
    set for the thread again.
    """
    if not checks_values():
        return _NO_CHANGE
    return _checking(*_CHECKS(jax.config))


@contextlib.contextmanager
def _checking(nans: bool, infs: bool) -> Iterator[None]:
    with jax.debug_nans(nans), jax.debug_infs(infs):
        yield


def on_cpu() -> bool:
    """Whether a program that is traced now will run on a CPU."""
    chosen = chosen_device()
    return (getattr(chosen, "platform", chosen) or jax.default_backend()) == "cpu"


def chosen_device() -> Any:
    """The value of `jax.default_device`: a device, the name of a platform, or None."""
    # JAX defines the attribute at run time.
    return jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]


def processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_GUARDS = attrgetter(
    "jax_transfer_guard",
    "jax_transfer_guard_host_to_device",
    "jax_transfer_guard_device_to_device",
    "jax_transfer_guard_device_to_host",
)


def transferring() -> contextlib.AbstractContextManager[Any]:
    """Allows the transfers in its `with` block, whatever `jax.transfer_guard` the user has set."""
    if _GUARDS(jax.config) == (None, None, None, None):
        return _NO_CHANGE
    return jax.transfer_guard("allow")
