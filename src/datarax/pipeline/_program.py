"""What is compiled: the batches of `step` and `for`, and whole scans.

Programs are compiled once for pipelines of equal structure, and kept with that.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from operator import sub
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from .._draws import written_out
from .._rows import Cut, touched
from .._settings import NO_TRACE, checking_values, on_cpu, trace, transferring
from .._types import Batch, Cursor, spec_text
from .._variables import iter_graph
from .._xla import ONE_THREAD, apart
from ..errors import CapturedError, RandomAccessError
from ..sources._base import EagerSourceBase, Fetched, length_of
from ._binding import (
    Changes,
    Structure,
    Values,
    cached_per_structure,
    changes,
    has_tracer,
    is_same,
    merge,
    type_change,
)
from ._captured import captured
from ._core import CUTS, fetched_from, order_at, run_batch, start_of, updated
from ._jaxpr import callers, constants, weight
from ._stages import NEEDS_VALUES

if TYPE_CHECKING:
    from ._pipeline import Pipeline

FETCHED_BYTES = 2**18
"""How many bytes of rows a scan fetches together, if they are of several batches: what stays in the
cache of a CPU."""

FETCHED_BYTES_ELSEWHERE = 2**24
"""The same on an accelerator, where every turn of a loop costs microseconds."""

ONE_THREAD_BYTES = 2**20
"""A CPU computes a batch on one thread if all arrays that it makes for it weigh no more: to share
out their kernels would take longer than to run them."""

SCANS = 16
"""How many scans a structure keeps, by function and length."""


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
    the device. `fed` are the batches with their cursors, where the host has read them.
    """

    def one(
        values: Values, order: Any, fetched: Fetched | None, cursor: Cursor
    ) -> tuple[Batch, Cursor, Changes]:
        (pipeline,) = merge(structure, values)
        if fetched is None:
            fetched = fetched_from(pipeline, order, cursor, cut, whole=count > 1)
        return run_batch(structure, values, fetched, cursor, cut)

    def run(values: Values, order: Any, fed: Any = None) -> list[tuple[Batch, Changes]]:
        cursor = start_of(merge(structure, values)[0], cut)
        results, after = [], {}
        for fetched, start in fed or [(None, None)] * count:
            now = updated(values, after), order, fetched, start or cursor
            # A branch that hangs on the cursor of the batch before: a chain stays in one thread.
            batch, cursor, new = apart(cursor.offset, one, *now) if count > 1 else one(*now)
            after = after | new
            moved = {} if cursor_index is None else {cursor_index: jnp.stack(cursor)}
            results.append((batch, after | moved))
        return results

    return Program(run, count, one_thread)


class Loop(NamedTuple):
    """How a scan runs: `length` batches of that `cut`, with a carry or without.

    Rows are gathered for up to `fetch` batches at a time, in a loop around that. `known` is the
    index of the cursor among the values, if the host knows where it ends.
    """

    length: int
    cut: Cut
    carried: bool
    unroll: int
    fetch: int | None = None
    known: int | None = None


@cached_per_structure(SCANS)
def scan_program(structure: Structure, step_fn: Callable[..., Any], loop: Loop) -> Program:
    """A scan, compiled."""

    def check(constants: Sequence[Any]) -> None:
        if names := captured(step_fn, constants):
            raise CapturedError(names)

    check([])  # before a trace that may fail for what it reaches
    return Program(_Scan(structure, step_fn, loop).run, check=check)


@dataclasses.dataclass(frozen=True, eq=False)
class _Scan:
    """Batches, each handed to `step_fn`, as one compiled loop."""

    structure: Structure
    step_fn: Callable[..., Any]
    loop: Loop

    def run(self, values: Values, carry: Any, fed: Any = None) -> tuple[Changes, Any, Any]:
        """The values that have changed (without the cursor if it is `known`), the carry, the outs.

        `fed` are batches that the host has read, with the cursors before and after each.
        """
        if fed is None:
            now, carry, outs = self._gathering(values, carry)
        else:
            (now, carry), outs = self._over(values, carry, fed, self.loop.length)
        pairs = enumerate(zip(now, values, strict=True))
        after = {i: x for i, (x, old) in pairs if i != self.loop.known and not is_same(x, old)}
        return after, carry, outs

    def _gathering(self, values: Values, carry: Any) -> tuple[Values, Any, Any]:
        """The loop that gathers rows, and hands them to the loop over their batches."""
        cut, structure = self.loop.cut, self.structure
        pipeline, *modules = merge(structure, values)
        count = fetched_at_once(pipeline, modules, self.loop.length, cut, self.loop.fetch)
        epochs = touched(cut, count, length_of(pipeline.source), pipeline.last_batch)
        first = start_of(pipeline, cut).epoch
        # Computed in the first turn of the loop, so that it is compiled in one place.
        specs = jax.eval_shape(lambda epoch: order_at(pipeline, epoch, epochs), first)
        order = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), specs)

        def batches(state: Any, _: None) -> tuple[Any, Any]:
            now, order, ordered, carry = state
            pipeline = merge(structure, now)[0]
            start = start_of(pipeline, cut)
            if jax.tree.leaves(order):
                order = jax.lax.cond(
                    start.epoch == ordered,
                    lambda _: order,
                    lambda epoch: order_at(pipeline, epoch, epochs),
                    start.epoch,
                )
            fetched = fetched_from(pipeline, order, start, cut, count)
            each = jax.tree.map(lambda x: x.reshape(count, cut.size, *x.shape[1:]), fetched)
            (now, carry), outs = self._over(now, carry, (each, None, None), count)
            return (now, order, start.epoch, carry), outs

        state = (values, order, first - first.dtype.type(1), carry)
        unroll = (
            self.loop.unroll if count == 1 else 1
        )  # else it is the loop within that counts batches
        (now, _, _, carry), outs = jax.lax.scan(
            batches, state, length=self.loop.length // count, unroll=unroll
        )
        return now, carry, jax.tree.map(lambda x: x.reshape(self.loop.length, *x.shape[2:]), outs)

    def _over(
        self, now: Values, carry: Any, fed: Any, count: int
    ) -> tuple[tuple[Values, Any], Any]:
        if count != 1:
            return jax.lax.scan(self._one, (now, carry), fed, length=count, unroll=self.loop.unroll)
        state, out = self._one((now, carry), jax.tree.map(lambda x: x[0], fed))
        return state, jax.tree.map(lambda x: jnp.asarray(x)[None], out)  # a number of Python, too

    def _one(self, state: tuple[Values, Any], fed: Any) -> tuple[tuple[Values, Any], Any]:
        (now, carry), (fetched, start, end) = state, fed
        start = start or start_of(merge(self.structure, now)[0], self.loop.cut)
        batch, moved, new = run_batch(self.structure, now, fetched, start, self.loop.cut)
        now = updated(now, new)
        roots = merge(self.structure, now)
        pipeline, *modules = roots
        # Before the call, since the pipeline itself may be among the modules.
        packed = jnp.stack(end or moved)
        pipeline._cursor_state.set_raw_value(packed)
        carry, out = self._called(carry, *modules, batch)
        if end is not None and pipeline._cursor_state.get_raw_value() is not packed:
            raise RandomAccessError(
                "The function of a scan moves the cursor of its own pipeline, whose source is "
                "a stream and gives its records in order. Use a source with a length."
            )
        return (updated(now, changes(self.structure, roots, now)), carry), out

    def _called(self, carry: Any, *args: Any) -> tuple[Any, Any]:
        given = (carry, *args) if self.loop.carried else args
        try:
            pair = self.step_fn(*given)
        except NEEDS_VALUES as error:
            error.add_note("The function of a scan is compiled: write it in jax.numpy.")
            raise
        except KeyError as error:
            error.add_note(f"The batch has {spec_text(args[-1])}.")
            raise
        except TypeError as error:
            if "positional argument" in str(error):
                first = "carry, " if self.loop.carried else ""
                error.add_note(
                    f"The function of a scan is called as `step_fn({first}*modules, batch)`, here "
                    f"with {len(args) - 1} of `modules`."
                )
            raise
        if not self.loop.carried:
            return carry, pair
        if not (isinstance(pair, tuple) and len(pair) == 2):
            raise TypeError(
                "With `init_carry`, the function of a scan must return the next carry and an "
                f"output as `(carry, out)`; it returned {pair!r}."
            )
        if change := type_change(carry, pair[0]):
            within, was, is_now = change
            raise TypeError(
                f"A scan must keep the type and shape of its carry, but `carry{within}` was {was} "
                f"and became {is_now}; let `init_carry` begin as what it becomes."
            )
        return pair


def fetched_at_once(
    pipeline: "Pipeline", modules: Sequence[Any], length: int, cut: Cut, most: int | None
) -> int:
    """For how many batches a scan fetches the rows together: a divisor of `length`.

    One kernel for the rows of several small batches is faster than one for each, and the order is
    best computed for many rows.
    """
    source = pipeline.source
    if not isinstance(source, EagerSourceBase) or length < 1:
        return 1
    # What `step_fn` may move or seed anew has to be looked at before every batch.
    parts = pipeline.source, pipeline._base, pipeline._cursor_state
    held = {id(x) for _, x in iter_graph(parts) if isinstance(x, nnx.Variable)}
    if any(id(x) in held for _, x in iter_graph(modules)):
        return 1
    if most is None and pipeline.sharding is not None:
        most = 1  # else every device would gather the rows of all
    if most is None:
        record = jax.tree.leaves(source.element_spec)
        row_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in record)
        most = FETCHED_BYTES if on_cpu() else FETCHED_BYTES_ELSEWHERE
        most //= max(row_bytes * cut.size, 1)
        most = most if most > 3 else 1  # to gather two or three together gains nothing
    return next(count for count in range(min(max(most, 1), length), 0, -1) if length % count == 0)
