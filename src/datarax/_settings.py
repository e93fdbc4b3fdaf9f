"""What JAX and this process have been told, for one thread or for all: settings, open traces, the
device, the processors."""

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


_CHECKS = attrgetter("jax_debug_nans", "jax_debug_infs")
_AS_IT_IS = contextlib.nullcontext()


def checks_values() -> bool:
    """Whether JAX has been told to raise where a program returns a NaN, or an infinite number."""
    return any(_CHECKS(jax.config))


def checking_values() -> contextlib.AbstractContextManager[Any]:
    """Lets JAX look for NaNs in what is called meanwhile, if it has been told to.

    When it runs a traced program as a function, as `cond` and others make it do, it stops looking,
    and begins again for none but the first call of any program in that thread.
    """
    if not checks_values():
        return _AS_IT_IS
    return _checking(*_CHECKS(jax.config))


@contextlib.contextmanager
def _checking(nans: bool, infs: bool) -> Iterator[None]:
    with jax.debug_nans(nans), jax.debug_infs(infs):
        yield


def on_cpu() -> bool:
    """Whether what is traced now is to run on the CPU."""
    chosen = chosen_device()
    return (getattr(chosen, "platform", chosen) or jax.default_backend()) == "cpu"


def chosen_device() -> Any:
    """What `jax.default_device` was given, if anything: a device, or the name of a platform."""
    # JAX makes the attribute as it runs.
    return jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]


def processors() -> int:
    """How many threads of this process can run at the same time."""
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
    """Marks what is transferred meanwhile as meant, for whoever has set `jax.transfer_guard`."""
    return (
        _AS_IT_IS
        if _GUARDS(jax.config) == (None, None, None, None)
        else jax.transfer_guard("allow")
    )
