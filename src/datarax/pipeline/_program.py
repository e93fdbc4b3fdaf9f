"""Compiled programs, and those that make the batches of `step` and `for`."""

import functools
import math
import time
from collections.abc import Callable
from operator import sub
from typing import Any

import jax
import jax.numpy as jnp

from .._draws import with_inlined_threefry
from .._rows import Cut
from .._settings import NO_TRACE, checking_values, on_cpu, trace, transferring
from .._types import Batch, Cursor
from .._xla import ONE_THREAD, in_own_branch
from ..sources._base import SourceBatch
from ._binding import Changes, Values, has_tracer, merge
from ._core import CUTS, fetched_from, run_batch, start_of, updated
from ._jaxpr import callers, constants, weight
from ._structure import Structure, cached_per_structure

ONE_THREAD_BYTES = 2**20
"""A batch whose arrays weigh no more together is computed on one thread of a CPU: to share out the
kernels among threads would take longer than to run them."""


class Program:
    """A compiled function, and what its first call has shown of it.

    `seconds`: what the first call took to trace, compile and run; of wall clock and processor time
        the smaller, since other processes may have held it up.
    `bytes`: the size of its results.
    `host_nodes`: the nodes that call back to the host while it runs; None stands for a function of
        the user's, outside of any node.
    `shared`: whether XLA may share out its kernels among the threads of a CPU. It may if a batch
        weighs more than `ONE_THREAD_BYTES`, and `one_thread` is False.
    `keeps_state`: whether a batch changes more than the cursor; None before the first call.
    `traced`, `called`: whether it was traced, and whether a call has succeeded.

    `batches` is how many batches the function computes one after the other. `check` is given the
    constants of the traced program, and raises to refuse them before anything is compiled.
    """

    seconds = math.inf
    bytes = 0
    host_nodes: frozenset[str | None] = frozenset()
    shared = False
    keeps_state: bool | None = None

    def __init__(
        self,
        function: Callable[..., Any],
        batches: int = 1,
        one_thread: bool = False,
        check: Callable[[list[Any]], None] = lambda constants: None,
    ):
        self._batches, self._one_thread, self._check = batches, one_thread, check
        self._function = function
        self.traced = self.called = False
        self._begin()

    def _begin(self) -> None:
        plain = self._function  # `self` would make a cycle, which keeps what the function holds

        @functools.wraps(plain)
        def function(*args: Any) -> Any:
            return plain(*args)

        self._jitted = jax.jit(function)
        self._inner: Any = self._jitted  # for calls inside a trace
        self._outer: Any = self._jitted  # for all other calls

    def __call__(self, values: Any, *args: Any) -> Any:
        with transferring(), checking_values():  # NumPy arguments are transferred, the cursor say
            if self.called:
                result = self._compiled(values, *args)
            else:
                result = self._first_call(values, *args)
        # Only a callback can fail at run time. Wait for it, so that the error is raised here.
        if self.host_nodes and not has_tracer([result]):
            jax.block_until_ready(result)
        return result

    def _first_call(self, *args: Any) -> Any:
        """Threads may make it at the same time: pipelines of equal structure share a program."""
        start = time.perf_counter(), time.process_time()
        try:
            self._first_look(self._jitted.trace(*args))
            result = self._compiled(*args)
        except BaseException as error:
            if not isinstance(error, Exception):
                # Interrupted, JAX may take the function for one that is being traced for ever.
                self._begin()
            raise
        end = time.perf_counter(), time.process_time()
        self.seconds = min(map(sub, end, start))
        self.called = True
        return result

    @property
    def _compiled(self) -> Any:
        return self._outer if trace() == NO_TRACE else self._inner

    def _first_look(self, traced: Any) -> None:
        self.traced = True
        jaxpr, out = traced.jaxpr, traced.out_info
        self._check(list(constants(jaxpr)))
        arrays = jax.tree.leaves(out)
        self.host_nodes = frozenset(callers(jaxpr, None))
        self.bytes = sum(x.size * x.dtype.itemsize for x in arrays)
        if not arrays and not self.host_nodes:  # nothing to compute: stored order, say
            self._inner = self._outer = lambda *_: out
            return
        if not on_cpu():
            return
        self.shared = not self._one_thread and weight(jaxpr) > self._batches * ONE_THREAD_BYTES
        options = None if self.shared else ONE_THREAD
        self._outer = jax.jit(with_inlined_threefry(self._jitted), compiler_options=options)


@cached_per_structure(CUTS)
def batch_program(
    structure: Structure,
    cut: Cut,
    count: int,
    cursor_index: int | None,
    one_thread: bool,
) -> Program:
    """A program for `count` batches in a row: each batch, and the values that have changed by then.

    If `count` is more than 1, all rows must lie in the epoch of the first. The changes include the
    cursor only if `cursor_index` says which value it is; otherwise the host computes it, without
    asking the device. `read` are rows that the host has read, with the cursors of their batches.
    """

    def one(
        values: Values, order: Any, fetched: SourceBatch | None, cursor: Cursor
    ) -> tuple[Batch, Cursor, Changes]:
        (pipeline,) = merge(structure, values)
        if fetched is None:
            fetched = fetched_from(pipeline, order, cursor, cut, whole=count > 1)
        return run_batch(structure, values, fetched, cursor, cut)

    def run(values: Values, order: Any, read: Any = None) -> list[tuple[Batch, Changes]]:
        cursor = start_of(merge(structure, values)[0], cut)
        results, after = [], {}
        for fetched, start in read or [(None, None)] * count:
            now = updated(values, after), order, fetched, start or cursor
            # The branch depends on the cursor of the batch before. XLA runs such a chain in one
            # thread, independent branches in several.
            batch, cursor, new = in_own_branch(cursor.offset, one, *now) if count > 1 else one(*now)
            after = after | new
            moved = {} if cursor_index is None else {cursor_index: jnp.stack(cursor)}
            results.append((batch, after | moved))
        return results

    return Program(run, count, one_thread)
