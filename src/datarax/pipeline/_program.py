"""What is compiled: the batches of `step` and `for`, and whole scans.

Programs are compiled once for pipelines of equal structure, and kept with that.
"""

import math
import time
from collections.abc import Callable
from operator import sub
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from .._draws import written_out
from .._rows import Cut
from .._settings import NO_TRACE, checking_values, on_cpu, trace, transferring
from .._types import Batch, Cursor
from .._xla import ONE_THREAD, apart
from ..sources._base import Fetched
from ._binding import Changes, Values, has_tracer, merge
from ._core import CUTS, fetched_from, run_batch, start_of, updated
from ._jaxpr import callers, constants, weight
from ._structure import Structure, cached_per_structure

if TYPE_CHECKING:
    pass

ONE_THREAD_BYTES = 2**20
"""A CPU computes a batch on one thread if all arrays that it makes for it weigh no more: to share
out their kernels would take longer than to run them."""


class Program:
    """A compiled function, and what its first call has shown of it.

    `seconds` that the first call took (tracing, compiling), by the clock or by the processors'
    time, whichever is less, since others may have held it up; `bytes` of what it returned; and
    `host_nodes`: the nodes that call back to the host while it runs, None for a function of the
    user's that does. `batches` is how many of these the function is written out for, one after the
    other. On a CPU its kernels are `shared` out among threads where that is worth it, unless it is
    to run on `one_thread`. It is `traced` before it is compiled, when `check` may refuse the
    constants that it has, and `called` once a first call went well. One for a batch `keeps_state`
    if that changes more than the cursor; None: it was not called.
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
        self.traced = False
        self._inner: Any = jax.jit(function)  # for a call inside a trace
        self._outer = self._inner  # and outside
        self.called = False

    def __call__(self, values: Any, *args: Any) -> Any:
        with transferring(), checking_values():  # a cursor is transferred, say
            if self.called:
                result = self._compiled(values, *args)
            else:
                start = time.perf_counter(), time.process_time()
                self._first_look(self._inner.trace(values, *args))
                result = self._compiled(values, *args)
                end = time.perf_counter(), time.process_time()
                self.seconds = min(map(sub, end, start))
                self.called = True
        # Only a call to the host fails at run time; whoever makes none is not waited for.
        if self.host_nodes and not has_tracer([result]):
            jax.block_until_ready(result)
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
        if not arrays and not self.host_nodes:  # records in stored order, say
            self._inner = self._outer = lambda *_: out
            return
        if not on_cpu():
            return
        self.shared = not self._one_thread and weight(jaxpr) > self._batches * ONE_THREAD_BYTES
        options = None if self.shared else ONE_THREAD
        self._outer = jax.jit(written_out(self._inner), compiler_options=options)


@cached_per_structure(CUTS)
def batch_program(
    structure: Structure,
    cut: Cut,
    count: int,
    cursor_index: int | None,
    one_thread: bool,
) -> Program:
    """`count` batches one after the other, each with the values that have changed by then.

    Several are whole: all rows of each are in the epoch of the first. The cursor is not among what
    changes, unless `cursor_index` says which value it is: on the host it is known without asking
    the device. `read` are the batches with their cursors, where the host has read them.
    """

    def one(
        values: Values, order: Any, fetched: Fetched | None, cursor: Cursor
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
            # A branch that hangs on the cursor of the batch before: a chain stays in one thread.
            batch, cursor, new = apart(cursor.offset, one, *now) if count > 1 else one(*now)
            after = after | new
            moved = {} if cursor_index is None else {cursor_index: jnp.stack(cursor)}
            results.append((batch, after | moved))
        return results

    return Program(run, count, one_thread)
